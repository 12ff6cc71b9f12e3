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
    return tasks(ort, context, scan, scan_forward_check, scan_forward_tasks, scan_forward_task);
  }
  int run(const Functions& ort, KernelContext* context, const hcmen_conv& conv) const {
    return tasks(ort, context, conv, conv_forward_check, conv_forward_tasks, conv_forward_task);
  }

  static std::string problem(int status) {
    return status == HCMEN_BAD_ISA ? hcmen_ops_problem() : "the kernel failed (status " + std::to_string(status) + ")";
  }

 private:
  template <class Arguments>
  static int tasks(const Functions& ort, KernelContext* context, const Arguments& arguments,
                   int (*checked)(const Arguments&), int64_t (*count)(const Arguments&),
                   int (*task)(const Arguments&, int64_t)) {
    if (const int status = checked(arguments)) {
      return status;
    }
    struct Job {
      const Arguments& arguments;
      int (*task)(const Arguments&, int64_t);
      std::atomic<int> worst;
    } job{arguments, task, {HCMEN_OK}};
    const auto step = [](void* data, size_t index) {
      Job& job = *static_cast<Job*>(data);
      const int status = job.task(job.arguments, static_cast<int64_t>(index));
      if (status != HCMEN_OK) {
        job.worst.store(status);
      }
    };
    const size_t total = static_cast<size_t>(count(arguments));
    if (total > 1 && ort.KernelContext_ParallelFor != nullptr) {
      check(ort.KernelContext_ParallelFor(context, step, total, 0, &job));
    } else {
      for (size_t i = 0; i < total; ++i) {
        step(&job, i);
      }
    }
    return job.worst.load();
  }
};

}  // namespace
}  // namespace hcmen::ort

// The entry point ONNX Runtime looks for in an operator library.
extern "C" __attribute__((visibility("default"))) hcmen::ort::Status* RegisterCustomOps(
    hcmen::ort::SessionOptions* options, const hcmen::ort::ApiBase* base) {
  return hcmen::ort::register_operators<hcmen::ort::Cpu>(options, base);
}
