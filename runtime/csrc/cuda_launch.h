// What the .cu files share: launching, errors, loads of four elements at once, and sums in a fixed order. Internal.
//
// With HCMEN_EMULATE the same sources are compiled for the host, and tests/emulation/cuda_emulation.h runs them.
#ifndef HCMEN_CUDA_LAUNCH_H_
#define HCMEN_CUDA_LAUNCH_H_

#if defined(HCMEN_EMULATE)
#include "cuda_emulation.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <stdint.h>

#include "checks.h"
#include "cuda_ops.h"

namespace hcmen {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// What any device gives a block without being asked for more.
constexpr int64_t kMostSharedBytes = 48 << 10;

// A grid has at most this many blocks.
constexpr int64_t kMostBlocks = INT32_MAX;

// Keeps what CUDA said, and what to do, for hcmen_cuda_problem. Returns HCMEN_CUDA_FAILED.
int failed(cudaError_t error);

// Likewise, of a grid that would need `blocks`, a double since the product may fit nothing else. HCMEN_OK if it may have
// them, else HCMEN_CUDA_TOO_LARGE.
int check_blocks(double blocks);

// Whether `kernel` may be launched. Loads it where `stream` is being recorded into a CUDA graph, as its first launch could
// not do it there.
int ready(const void* kernel, int64_t blocks, void* stream);

// Loads a kernel, which its first launch would do else.
int load_kernel(const void* kernel);

#if defined(HCMEN_EMULATE)
inline float* shared_memory() { return ::emulation::block->shared.get(); }
#else
__device__ inline float* shared_memory() {
  extern __shared__ float4 hcmen_shared[];
  return reinterpret_cast<float*>(hcmen_shared);
}
#endif

template <class Arguments>
int launch(void (*kernel)(Arguments), int64_t blocks, int threads, int64_t shared_bytes, void* stream,
           const Arguments& arguments) {
  const void* const code = reinterpret_cast<const void*>(kernel);
  if (const int status = ready(code, blocks, stream)) return status;
#if defined(HCMEN_EMULATE)
  const cudaError_t error = ::emulation::load(code);
  if (error == cudaSuccess) {
    ::emulation::launch((unsigned)blocks, (unsigned)threads, (size_t)shared_bytes, [&] { kernel(arguments); });
  }
#else
  Arguments copy = arguments;
  void* list[] = {&copy};
  const cudaError_t error = cudaLaunchKernel(code, dim3((unsigned)blocks), dim3((unsigned)threads), list,
                                             (size_t)shared_bytes, static_cast<cudaStream_t>(stream));
#endif
  return error == cudaSuccess ? HCMEN_OK : failed(error);
}

template <class Arguments>
int load_kernel(void (*kernel)(Arguments)) {
  return load_kernel(reinterpret_cast<const void*>(kernel));
}

template <class Arguments, class... Others>
int load_kernels(void (*kernel)(Arguments), Others... others) {
  const int status = load_kernel(kernel);
  if constexpr (sizeof...(others) == 0) {
    return status;
  } else {
    return status ? status : load_kernels(others...);
  }
}

// The kernels of each file.
int load_forward_kernels();
int load_backward_kernels();
int load_convolution_kernels();
int load_dual_forward_kernels();
int load_dual_backward_kernels();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- elements -------------------------------------------------------------------------------------------------------

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

__host__ __device__ __forceinline__ float widened(float x) { return x; }
__host__ __device__ __forceinline__ float widened(__half x) { return __half2float(x); }
__host__ __device__ __forceinline__ void narrow(float x, float* to) { *to = x; }
__host__ __device__ __forceinline__ void narrow(float x, __half* to) { *to = __float2half_rn(x); }

// Four consecutive elements; the address must be a multiple of their size.
template <class T>
__device__ __forceinline__ void load(const T* from, float (&to)[4]) {
  const Four<T> x = *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = widened(x.at[i]);
}

template <class T>
__device__ __forceinline__ void store(const float (&from)[4], T* to) {
  Four<T> x;
#pragma unroll
  for (int i = 0; i < 4; ++i) narrow(from[i], &x.at[i]);
  *reinterpret_cast<Four<T>*>(to) = x;
}

inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % (uintptr_t)bytes == 0; }

// --- sums of parts --------------------------------------------------------------------------------------------------

// to[i] = parts[0][i] + parts[1][i] + ..., in that order. With `columns` > 0 parts are [rows][columns] and `to` is
// [columns][rows]: a transpose on the way.
struct SumArguments {
  const float* parts;
  int64_t count, stride, size, columns;
  float* to;
};

int sum_parts(const SumArguments& arguments, void* stream);

}  // namespace cuda
}  // namespace hcmen

#endif  // HCMEN_CUDA_LAUNCH_H_
