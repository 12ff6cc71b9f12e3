// What the kernels' files share: the last error of CUDA, sums of parts, and the kernel that does nothing.
#include "cuda_launch.h"

#include <stdio.h>
#include <stdlib.h>

#include "cuda_memory.h"

namespace hcmen {
namespace cuda {
namespace {

thread_local char problem[256] = "";

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

}  // namespace

int failed(cudaError_t error) {
#if defined(HCMEN_EMULATE)
  snprintf(problem, sizeof(problem), "error %d", error);
#else
  snprintf(problem, sizeof(problem), "%s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
  // Said once, here; the next caller of the runtime shall not find it.
  cudaGetLastError();
#endif
  return HCMEN_CUDA_FAILED;
}

#if defined(HCMEN_EMULATE)
int allocate(int64_t bytes, void** memory) {
  *memory = malloc((size_t)bytes);
  return *memory ? HCMEN_OK : HCMEN_NO_MEMORY;
}
void release(void* memory) { free(memory); }
bool capturing(void*) { return false; }
#else
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
#endif

int sum_parts(const SumArguments& arguments, void* stream) {
  const int64_t blocks = ceil_div(arguments.size, kSumThreads);
  if (blocks > kMostBlocks) return HCMEN_BAD_ARGUMENT;
  return launch(sum_parts_kernel, blocks, kSumThreads, 0, stream, arguments);
}

}  // namespace cuda
}  // namespace hcmen

extern "C" {

HCMEN_API int hcmen_cuda_ops_version(void) { return HCMEN_CUDA_OPS_VERSION; }

HCMEN_API int hcmen_cuda_warm(void) {
  using namespace hcmen::cuda;
  for (const auto load : {load_forward_kernels, load_backward_kernels, load_convolution_kernels}) {
    if (const int status = load()) return status;
  }
  return load_kernels(sum_parts_kernel, nothing_kernel);
}

HCMEN_API const char* hcmen_cuda_problem(void) { return hcmen::cuda::problem; }

HCMEN_API int hcmen_cuda_nothing(const hcmen_cuda_launch* launch) {
  using namespace hcmen::cuda;
  return launch ? hcmen::cuda::launch(nothing_kernel, 1, kWarp, 0, launch->stream, Nothing{}) : HCMEN_BAD_ARGUMENT;
}

}  // extern "C"
