// Runs CUDA kernels on the host: enough of the language and the runtime for runtime/csrc/*.cu, no more.
//
// A kernel's source is compiled as it stands, by a C++ compiler, with HCMEN_EMULATE defined. Its blocks run one after
// the other. The threads of a block are
//
//   fibers   one at a time, switched at barriers and shuffles, in an order that a test chooses: what depends on an
//            order that CUDA does not promise comes out differently. Runs under AddressSanitizer and UBSan.
//   threads  with HCMEN_EMULATE_THREADS: real ones, so that ThreadSanitizer sees every unordered access.
//
// Shared memory is a heap block of exactly the size asked for and full of NaN at the start of each block. A barrier that
// not all threads of a block (a shuffle: of a warp) come to, or that they come to from different lines, ends the process
// with a message. What this cannot show: how long anything takes, the hardware's own exp2 and division, and the
// reordering of memory accesses within a warp that the compiler of the device may do.
#ifndef HCMEN_CUDA_EMULATION_H_
#define HCMEN_CUDA_EMULATION_H_

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#if defined(HCMEN_EMULATE_THREADS)
#include <pthread.h>

#include <thread>
#else
#include <ucontext.h>
#endif

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureWrongThread = 908,
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed = 2 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
struct cudaFuncAttributes {};
// What nvcc makes of the options with architectures.
#define __CUDA_ARCH_LIST__ 750, 900, 1200

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct __half {
  _Float16 value;
};
inline float __half2float(__half x) { return (float)x.value; }
inline __half __float2half_rn(float x) { return {(_Float16)x}; }

namespace emulation {

constexpr unsigned kWarp = 32;

enum Order { kAscending, kDescending, kMixed };
inline Order order = kAscending;

[[noreturn]] inline void stop(const char* message, int line) {
  fprintf(stderr, "emulation: %s (line %d)\n", message, line);
  fflush(stderr);
  abort();
}

// A meeting of `expected` threads.
struct Barrier {
  unsigned expected = 0, arrived = 0;
  uint64_t generation = 0;
  int line = 0;
#if defined(HCMEN_EMULATE_THREADS)
  pthread_barrier_t barrier;
#endif
};

struct Warp {
  Barrier barrier;
  float posted[2][kWarp];  // by turns: nobody posts again before all have read what was posted before the last
};

struct Thread {
  dim3 index;
  unsigned turn = 0;
  Warp* warp = nullptr;
  bool done = false;
#if !defined(HCMEN_EMULATE_THREADS)
  ucontext_t context;
#endif
};

struct Block {
  dim3 index, size, grid;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  std::unique_ptr<float[]> shared;
  const std::function<void()>* kernel = nullptr;
#if !defined(HCMEN_EMULATE_THREADS)
  ucontext_t scheduler;
#endif
};

inline Block* block = nullptr;
#if defined(HCMEN_EMULATE_THREADS)
inline thread_local Thread* self = nullptr;
#else
inline Thread* self = nullptr;
inline uint64_t progress = 0;
#endif

inline void meet(Barrier& barrier, int line) {
#if defined(HCMEN_EMULATE_THREADS)
  (void)line;
  pthread_barrier_wait(&barrier.barrier);
#else
  if (barrier.arrived == 0) barrier.line = line;
  if (barrier.line != line) stop("threads meet at different barriers", line);
  ++progress;
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) swapcontext(&self->context, &block->scheduler);
#endif
}

inline float exchange(float value, unsigned partner, int line) {
  Thread& me = *self;
  float* posted = me.warp->posted[me.turn++ & 1];
  posted[me.index.x % kWarp] = value;
  meet(me.warp->barrier, line);
  return posted[partner % kWarp];
}

#if !defined(HCMEN_EMULATE_THREADS)
inline void enter() {
  (*block->kernel)();
  self->done = true;
  ++progress;
  swapcontext(&self->context, &block->scheduler);
}

inline void run_threads(Block& b) {
  constexpr size_t kStack = 256 << 10;
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() < b.threads.size()) stacks.emplace_back(new char[kStack]);
  for (size_t i = 0; i < b.threads.size(); ++i) {
    ucontext_t& context = b.threads[i].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[i].get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
  }
  const size_t count = b.threads.size();
  for (uint64_t round = 0;; ++round) {
    const uint64_t before = progress;
    bool running = false;
    for (size_t i = 0; i < count; ++i) {
      size_t which = i;
      if (order == kDescending) which = count - 1 - i;
      // An odd factor and a power of two; other counts are walked in a rotated order.
      if (order == kMixed) which = (count & (count - 1)) == 0 ? (i * 37 + round * 11) % count : (i + round * 11) % count;
      Thread& t = b.threads[which];
      if (t.done) continue;
      running = true;
      self = &t;
      swapcontext(&b.scheduler, &t.context);
    }
    if (!running) return;
    if (progress == before) stop("a barrier that not all threads come to", b.barrier.line);
  }
}
#else
inline void run_threads(Block& b) {
  pthread_barrier_init(&b.barrier.barrier, nullptr, b.barrier.expected);
  for (Warp& w : b.warps) pthread_barrier_init(&w.barrier.barrier, nullptr, w.barrier.expected);
  std::vector<std::thread> threads;
  for (Thread& t : b.threads) {
    threads.emplace_back([&b, &t] {
      self = &t;
      (*b.kernel)();
    });
  }
  for (std::thread& t : threads) t.join();
  pthread_barrier_destroy(&b.barrier.barrier);
  for (Warp& w : b.warps) pthread_barrier_destroy(&w.barrier.barrier);
}
#endif

inline uint64_t launches = 0;

// What tests/emulation/control.cc sets. failure: what every call of CUDA returns that works on the device. recording: a
// stream is being recorded, during which kernels can be loaded in the relaxed mode alone.
inline cudaError_t failure = cudaSuccess;
inline int driver_version = 13000;
inline bool recording = false;
inline cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
inline std::set<const void*> loaded;

inline cudaError_t load(const void* code) {
  if (failure != cudaSuccess) return failure;
  if (loaded.count(code) == 0 && recording && mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
  loaded.insert(code);
  return cudaSuccess;
}

inline void launch(unsigned grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (grid == 0 || threads == 0 || threads > 1024 || shared_bytes > 48 << 10) stop("a launch that CUDA refuses", 0);
  ++launches;
  for (unsigned i = 0; i < grid; ++i) {
    Block b;
    b.index.x = order == kDescending ? grid - 1 - i : i;
    b.size.x = threads;
    b.grid.x = grid;
    b.kernel = &kernel;
    b.barrier.expected = threads;
    b.warps.resize((threads + kWarp - 1) / kWarp);
    b.threads.resize(threads);
    b.shared.reset(new float[shared_bytes / sizeof(float)]);
    memset((void*)b.shared.get(), 0xff, shared_bytes);
    for (unsigned t = 0; t < threads; ++t) {
      b.threads[t].index.x = t;
      b.threads[t].warp = &b.warps[t / kWarp];
      ++b.warps[t / kWarp].barrier.expected;
    }
    block = &b;
    run_threads(b);
    block = nullptr;
  }
}

}  // namespace emulation

// --- the runtime ----------------------------------------------------------------------------------------------------

inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorEmulated"; }
inline const char* cudaGetErrorString(cudaError_t) { return "in words"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = emulation::driver_version, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 8 : 6;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* code) { return emulation::load(code); }
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = emulation::failure == cudaSuccess ? malloc(bytes) : nullptr;
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* memory) { return free(memory), cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulation::recording ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, emulation::mode);
  return cudaSuccess;
}

#define threadIdx (::emulation::self->index)
#define blockIdx (::emulation::block->index)
#define blockDim (::emulation::block->size)
#define gridDim (::emulation::block->grid)
#define __syncthreads() ::emulation::meet(::emulation::block->barrier, __LINE__)
#define __syncwarp() ::emulation::meet(::emulation::self->warp->barrier, __LINE__)
#define __shfl_sync(mask, value, lane) ::emulation::exchange((value), (unsigned)(lane), __LINE__)
#define __shfl_xor_sync(mask, value, lanes) \
  ::emulation::exchange((value), ::emulation::self->index.x ^ (unsigned)(lanes), __LINE__)

#endif  // HCMEN_CUDA_EMULATION_H_
