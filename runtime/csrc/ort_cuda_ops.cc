// The operators for ONNX Runtime's CUDA provider: on the session's stream, without waiting for it.
#include <map>
#include <mutex>

#include "cuda_memory.h"
#include "cuda_ops.h"
#include "ort_operators.h"

#if !defined(HCMEN_ORT_PROVIDER)
#define HCMEN_ORT_PROVIDER "CUDAExecutionProvider"  // tests run the emulated kernels under another one
#endif

namespace hcmen::ort {
namespace {

class Cuda {
 public:
  static constexpr const char* kProvider = HCMEN_ORT_PROVIDER;
  static constexpr const char* kLibrary = "libhcmen_ops_cuda.so";
  static constexpr const char* kOtherLibrary = "libhcmen_ops.so";
  static constexpr const char* kMark = "custom_op.hcmen.cuda.registered";
  static constexpr const char* kOtherMark = "custom_op.hcmen.registered";

  Cuda(const Functions&, const Api*) {}
  Cuda(const Cuda&) = delete;
  Cuda& operator=(const Cuda&) = delete;
  ~Cuda() {
    for (const auto& [stream, memory] : workspaces_) {
      for (void* piece : memory.pieces) cuda::release(piece);
    }
  }

  int run(const Functions& ort, KernelContext* context, const hcmen_scan& scan) {
    return run(ort, context, scan, hcmen_cuda_selective_scan_workspace, hcmen_cuda_selective_scan_forward);
  }

  int run(const Functions& ort, KernelContext* context, const hcmen_dual& dual) {
    return run(ort, context, dual, hcmen_cuda_state_space_dual_workspace, hcmen_cuda_state_space_dual_forward);
  }

  int run(const Functions& ort, KernelContext* context, const hcmen_conv& conv) {
    hcmen_cuda_launch launch{};
    check(ort.KernelContext_GetGPUComputeStream(context, &launch.stream));
    return hcmen_cuda_causal_conv1d_forward(&conv, &launch);
  }

  static std::string problem(int status) {
    if (status == HCMEN_CUDA_FAILED || status == HCMEN_CUDA_TOO_LARGE) {
      return std::string(status == HCMEN_CUDA_FAILED ? "CUDA failed: " : "") + hcmen_cuda_problem() + ": " + hcmen_cuda_fix();
    }
    return "the kernel failed (status " + std::to_string(status) + ")";
  }

 private:
  // A recurrence, which may be cut into chunks.
  template <class Arguments>
  int run(const Functions& ort, KernelContext* context, const Arguments& arguments,
          int (*need)(const Arguments*, const hcmen_cuda_launch*, int, int64_t*),
          int (*forward)(const Arguments*, const hcmen_cuda_launch*)) {
    hcmen_cuda_launch launch{};
    check(ort.KernelContext_GetGPUComputeStream(context, &launch.stream));
    if (const int status = need(&arguments, &launch, 0, &launch.workspace_bytes)) return status;
    if (launch.workspace_bytes == 0) return forward(&arguments, &launch);
    // Held until all launches of this run are queued, so that those of another run on the same stream come after them.
    const std::lock_guard<std::mutex> lock(mutex_);
    launch.workspace = workspace(launch.stream, launch.workspace_bytes);
    if (launch.workspace == nullptr) {
      // One block for a whole sequence needs none, and takes longer.
      launch.steps_per_chunk = -1;
      launch.workspace_bytes = 0;
    }
    return forward(&arguments, &launch);
  }

  // Memory of one stream. A piece that became too small is kept: work that was queued, or recorded in a graph, uses it.
  struct Memory {
    std::vector<void*> pieces;
    int64_t bytes = 0;  // of the last piece
  };
  // A runtime keeps its streams, one for each run at a time. Past so many, scans do without.
  static constexpr size_t kMostStreams = 64;

  // Null if there is none to be had now.
  void* workspace(void* stream, int64_t bytes) {
    const auto found = workspaces_.find(stream);
    if (found != workspaces_.end() && found->second.bytes >= bytes) return found->second.pieces.back();
    if ((found == workspaces_.end() && workspaces_.size() >= kMostStreams) || cuda::capturing(stream)) return nullptr;
    void* piece = nullptr;
    if (cuda::allocate(bytes, &piece) != HCMEN_OK) return nullptr;
    Memory& memory = workspaces_[stream];
    memory.pieces.push_back(piece);
    memory.bytes = bytes;
    return piece;
  }

  std::mutex mutex_;
  std::map<void*, Memory> workspaces_;
};

}  // namespace
}  // namespace hcmen::ort

// The entry point ONNX Runtime looks for in an operator library.
extern "C" __attribute__((visibility("default"))) hcmen::ort::Status* RegisterCustomOps(
    hcmen::ort::SessionOptions* options, const hcmen::ort::ApiBase* base) {
  // A session may record its first run into a CUDA graph. Where there is no device, its first run says so.
  hcmen_cuda_warm();
  return hcmen::ort::register_operators<hcmen::ort::Cuda>(options, base);
}
