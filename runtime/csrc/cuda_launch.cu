// What the kernels' files share: the last error of CUDA, sums of parts, and the kernel that does nothing.
#include "cuda_launch.h"

#include <stdio.h>

#include "cuda_memory.h"

namespace hcmen {
namespace cuda {
namespace {

thread_local char problem[400] = "", fix[100] = "";

constexpr int kSumThreads = 128;

__global__ void __launch_bounds__(kSumThreads) sum_parts_kernel(const SumArguments a) {
  const int64_t index = (int64_t)blockIdx.x * kSumThreads + threadIdx.x;
  if (index >= a.size) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t i = 0; i < a.count; ++i) sum += a.parts[i * a.stride + index];
  const int64_t rows = a.columns > 0 ? a.size / a.columns : 1;
  a.to[a.columns > 0 ? index % a.columns * rows + index / a.columns : index] = sum;
}

struct Nothing {};

__global__ void nothing_kernel(const Nothing) {}

// While it lives, this thread may load kernels although a stream is being recorded into a CUDA graph. Without it CUDA
// forbids that and spoils the recording.
class Relaxed {
 public:
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// The architectures that this library has code for, as 75, 90.
void add_architectures(char* to, size_t size) {
  size_t used = 0;
  for (const int architecture : {__CUDA_ARCH_LIST__}) {
    if (used < size) used += snprintf(to + used, size - used, "%s%d", used ? ", " : "", architecture / 10);
  }
}

int device_architecture() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    return 0;
  }
  return 10 * major + minor;
}

// Puts what is known besides `error` into `facts`, and what to do about it into `fix`.
void look_into(cudaError_t error, char* facts, size_t size) {
  int driver = 0, runtime = 0;
  const auto to_do = [](const char* what) { snprintf(fix, sizeof(fix), "%s", what); };
  switch (error) {
    case cudaErrorNoKernelImageForDevice: {
      char known[100] = "";
      add_architectures(known, sizeof(known));
      const int device = device_architecture();
      snprintf(facts, size, ": the device is sm_%d, the library has code for %s", device, known);
      snprintf(fix, sizeof(fix), "build the library for %d: docs/cuda.md", device);
      return;
    }
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion:
      cudaDriverGetVersion(&driver);
      cudaRuntimeGetVersion(&runtime);
      if (driver == 0) {
        snprintf(facts, size, ": there is no CUDA driver");
        return to_do("install NVIDIA's driver");
      }
      snprintf(facts, size, ": the driver serves CUDA %d.%d, the library was built with %d.%d", driver / 1000,
               driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
      return to_do("update the driver, or build the library with an older nvcc");
    case cudaErrorMemoryAllocation: return to_do("take fewer sequences at once, or end what else uses the device");
    default:
      if (error >= cudaErrorStreamCaptureUnsupported && error <= cudaErrorStreamCaptureWrongThread) {
        return to_do("run it once before a CUDA graph records it");
      }
      to_do("check the driver and the device with nvidia-smi");
  }
}

}  // namespace

int failed(cudaError_t error) {
  char facts[160] = "";
  look_into(error, facts, sizeof(facts));
  snprintf(problem, sizeof(problem), "%s (%s)%s", cudaGetErrorName(error), cudaGetErrorString(error), facts);
  // Said once, here; the next caller of the runtime shall not find it.
  cudaGetLastError();
  return HCMEN_CUDA_FAILED;
}

int check_blocks(double blocks) {
  if (blocks <= (double)kMostBlocks) return HCMEN_OK;
  snprintf(problem, sizeof(problem), "%.0f blocks of work, expected at most the %d of a grid", blocks, (int)kMostBlocks);
  snprintf(fix, sizeof(fix), "take fewer sequences at once");
  return HCMEN_CUDA_TOO_LARGE;
}

int load_kernel(const void* kernel) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  return error == cudaSuccess ? HCMEN_OK : failed(error);
}

int ready(const void* kernel, int64_t blocks, void* stream) {
  if (const int status = check_blocks((double)blocks)) return status;
  if (!capturing(stream)) return HCMEN_OK;
  const Relaxed relaxed;
  return load_kernel(kernel);
}

int allocate(int64_t bytes, void** memory) {
  const cudaError_t error = cudaMalloc(memory, (size_t)bytes);
  if (error == cudaSuccess) return HCMEN_OK;
  const int status = failed(error);
  return error == cudaErrorMemoryAllocation ? (int)HCMEN_NO_MEMORY : status;
}

void release(void* memory) {
  // At the end of a process the device may be gone before its memory is given back.
  if (cudaFree(memory) != cudaSuccess) cudaGetLastError();
}

bool capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) != cudaSuccess) {
    // The default stream cannot be asked while another one is being recorded.
    cudaGetLastError();
    return true;
  }
  return status != cudaStreamCaptureStatusNone;
}

int sum_parts(const SumArguments& arguments, void* stream) {
  const int64_t blocks = ceil_div(arguments.size, kSumThreads);
  return launch(sum_parts_kernel, blocks, kSumThreads, 0, stream, arguments);
}

}  // namespace cuda
}  // namespace hcmen

extern "C" {

HCMEN_API int hcmen_cuda_ops_version(void) { return HCMEN_CUDA_OPS_VERSION; }

HCMEN_API int hcmen_cuda_warm(void) {
  using namespace hcmen::cuda;
  const Relaxed relaxed;
  for (const auto load : {load_forward_kernels, load_backward_kernels, load_convolution_kernels, load_dual_forward_kernels,
                          load_dual_backward_kernels}) {
    if (const int status = load()) return status;
  }
  return load_kernels(sum_parts_kernel, nothing_kernel);
}

HCMEN_API const char* hcmen_cuda_problem(void) { return hcmen::cuda::problem; }

HCMEN_API const char* hcmen_cuda_fix(void) { return hcmen::cuda::fix; }

HCMEN_API int hcmen_cuda_nothing(const hcmen_cuda_launch* launch) {
  using namespace hcmen::cuda;
  return launch ? hcmen::cuda::launch(nothing_kernel, 1, kWarp, 0, launch->stream, Nothing{}) : HCMEN_BAD_ARGUMENT;
}

}  // extern "C"
