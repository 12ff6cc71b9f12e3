// The operators for ONNX Runtime's CPU provider: on the session's own threads.
#include <atomic>

#include "kernels.h"
#include "ort_operators.h"

namespace hcmen::ort {
namespace {

struct Cpu {
  static constexpr const char* kProvider = "CPUExecutionProvider";
  static constexpr const char* kLibrary = "libhcmen_ops.so";
  static constexpr const char* kOtherLibrary = "libhcmen_ops_cuda.so";
  static constexpr const char* kMark = "custom_op.hcmen.registered";
  static constexpr const char* kOtherMark = "custom_op.hcmen.cuda.registered";

  Cpu(const Functions&, const Api*) {}

  int run(const Functions& ort, KernelContext* context, const hcmen_scan& scan) const {
    Pool pool{ort, context};
    return scan_forward(scan, pool.threads());
  }
  int run(const Functions& ort, KernelContext* context, const hcmen_conv& conv) const {
    Pool pool{ort, context};
    return conv_forward(conv, pool.threads());
  }
  int run(const Functions& ort, KernelContext* context, const hcmen_dual& dual) const {
    Pool pool{ort, context};
    return dual_forward(dual, pool.threads());
  }

  static std::string problem(int status) {
    return status == HCMEN_BAD_ISA ? hcmen_ops_problem() : "the kernel failed (status " + std::to_string(status) + ")";
  }

 private:
  // The threads of a session, which does not tell how many they are. Idle ones spin for a while, so nothing is too brief.
  struct Pool {
    const Functions& ort;
    KernelContext* context;

    Threads threads() {
      const int most = ort.KernelContext_ParallelFor != nullptr ? 0 : 1;
      return {most, run, this};
    }

    static int run(void* self, int64_t tasks, int (*task)(void*, int64_t), void* context, bool) {
      const Pool& pool = *static_cast<Pool*>(self);
      struct Job {
        int (*task)(void*, int64_t);
        void* context;
        std::atomic<int> worst;
      } job{task, context, {HCMEN_OK}};
      const auto step = [](void* data, size_t index) {
        Job& job = *static_cast<Job*>(data);
        const int status = job.task(job.context, static_cast<int64_t>(index));
        if (status != HCMEN_OK) {
          job.worst.store(status);
        }
      };
      check(pool.ort.KernelContext_ParallelFor(pool.context, step, static_cast<size_t>(tasks), 0, &job));
      return job.worst.load();
    }
  };
};

}  // namespace
}  // namespace hcmen::ort

// The entry point ONNX Runtime looks for in an operator library.
extern "C" __attribute__((visibility("default"))) hcmen::ort::Status* RegisterCustomOps(
    hcmen::ort::SessionOptions* options, const hcmen::ort::ApiBase* base) {
  return hcmen::ort::register_operators<hcmen::ort::Cpu>(options, base);
}
