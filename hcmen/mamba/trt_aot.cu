// The kernels that trt_aot.py puts inside TensorRT engines: one for every kind of node, with what is known of it when
// the engine is built as constants. One kernel per node and no workspace is all that TensorRT has room for there, so
// time is walked through in order; what runs side by side is the batch, the channels and their states. The arithmetic is
// that of the other kernels, scan_step.h.
//
//   HCMEN_KERNEL    the name of the kernel
//   HCMEN_HALF      0 or 1: float16 for what docs/op.md calls T
//   HCMEN_REVERSE   0 or 1
//   HCMEN_CHANNEL   and, for a scan, HCMEN_STATE, HCMEN_GROUP, HCMEN_DELTA_SOFTPLUS, HCMEN_GATED, HCMEN_STATEFUL,
//                   HCMEN_LANES (a power of two up to 32: threads that share the states of a channel);
//                   for a convolution HCMEN_WIDTH, HCMEN_SILU, HCMEN_STATEFUL, HCMEN_STEPS (outputs of a thread)
//
// Parameters in TensorRT's order: inputs, integers, outputs. Blocks are of HCMEN_THREADS threads, in one dimension.
#if defined(HCMEN_EMULATE)
#include "cuda_emulation.h"
#define HCMEN_ENTRY __global__
#else
#define HCMEN_ENTRY extern "C" __global__
#endif
#if defined(__CUDACC_RTC__)
using int64_t = long long;
#endif
#include "scan_step.h"

namespace {

namespace step = hcmen::step;

// NVRTC has no cuda_fp16.h at hand; two instructions are all it would be needed for.
#if HCMEN_HALF && defined(HCMEN_EMULATE)
using Element = __half;
__device__ __forceinline__ float widened(Element x) { return __half2float(x); }
__device__ __forceinline__ Element narrow(float x) { return __float2half_rn(x); }
#elif HCMEN_HALF
struct Element {
  unsigned short bits;
};
__device__ __forceinline__ float widened(Element x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ Element narrow(float x) {
  Element y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
#else
using Element = float;
__device__ __forceinline__ float widened(Element x) { return x; }
__device__ __forceinline__ Element narrow(float x) { return x; }
#endif

}  // namespace

#if defined(HCMEN_STATE)

// Thread t of a block has lane t % HCMEN_LANES of channel t / HCMEN_LANES, and of its states every HCMEN_LANES-th.
HCMEN_ENTRY void __launch_bounds__(HCMEN_THREADS)
    HCMEN_KERNEL(const Element* u, const Element* delta, const float* A, const Element* B, const Element* C,
                 const float* D, const float* delta_bias,
#if HCMEN_GATED
                 const Element* z,
#endif
#if HCMEN_STATEFUL
                 const float* initial_state,
#endif
                 int batch, int time, Element* y
#if HCMEN_STATEFUL
                 ,
                 float* last_state
#endif
    ) {
  constexpr int kStates = (HCMEN_STATE + HCMEN_LANES - 1) / HCMEN_LANES;
  constexpr int kBlockChannels = HCMEN_THREADS / HCMEN_LANES;
  constexpr int kBlocks = (HCMEN_CHANNEL + kBlockChannels - 1) / kBlockChannels;
  // Steps read before the first of them is computed: a step waits for memory long, and for the one before it too.
  constexpr int kAhead = 4;

  const int lane = (int)threadIdx.x % HCMEN_LANES;
  const int wanted = (int)(blockIdx.x % kBlocks) * kBlockChannels + (int)threadIdx.x / HCMEN_LANES;
  const int64_t element = blockIdx.x / kBlocks;
  if (element >= batch) return;
  // Threads past the last channel do its work once more, so that all of a warp meet in the sums, and write nothing.
  const bool own = wanted < HCMEN_CHANNEL;
  const int channel = own ? wanted : HCMEN_CHANNEL - 1;
  const int group = channel / (HCMEN_CHANNEL / HCMEN_GROUP);

  float rate[kStates], state[kStates];
#pragma unroll
  for (int j = 0; j < kStates; ++j) {
    const int n = j * HCMEN_LANES + lane;
    const bool there = n < HCMEN_STATE;
    rate[j] = there ? A[channel * HCMEN_STATE + n] * step::kLog2e : 0.0f;
    state[j] = 0.0f;
#if HCMEN_STATEFUL
    if (there) state[j] = initial_state[(element * HCMEN_CHANNEL + channel) * HCMEN_STATE + n];
#endif
  }
  const float skip = D[channel], bias = delta_bias[channel];

  for (int64_t begin = 0; begin < time; begin += kAhead) {
    float us[kAhead], deltas[kAhead], Bs[kAhead][kStates], Cs[kAhead][kStates];
    float zs[kAhead] = {};
    int64_t places[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      // Past the end the last step is read again, and not used.
      const int64_t index = begin + k < time ? begin + k : time - 1;
      const int64_t row = element * time + step::place(index, time, HCMEN_REVERSE);
      places[k] = row * HCMEN_CHANNEL + channel;
      us[k] = widened(u[places[k]]);
      deltas[k] = widened(delta[places[k]]);
#if HCMEN_GATED
      zs[k] = widened(z[places[k]]);
#endif
      const int64_t projection = (row * HCMEN_GROUP + group) * HCMEN_STATE;
#pragma unroll
      for (int j = 0; j < kStates; ++j) {
        const int n = j * HCMEN_LANES + lane;
        Bs[k][j] = n < HCMEN_STATE ? widened(B[projection + n]) : 0.0f;
        Cs[k][j] = n < HCMEN_STATE ? widened(C[projection + n]) : 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (begin + k >= time) break;
      const float d = step::step_size(deltas[k], bias, HCMEN_DELTA_SOFTPLUS);
      const float input = d * us[k];
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kStates; ++j) {
        state[j] = step::advance(state[j], d, rate[j], input, Bs[k][j]);
        sum = fmaf(Cs[k][j], state[j], sum);
      }
#pragma unroll
      for (int other = HCMEN_LANES / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
      if (own && lane == 0) y[places[k]] = narrow(step::output(sum, us[k], skip, HCMEN_GATED, zs[k]));
    }
  }
#if HCMEN_STATEFUL
#pragma unroll
  for (int j = 0; j < kStates; ++j) {
    const int n = j * HCMEN_LANES + lane;
    if (own && n < HCMEN_STATE) last_state[(element * HCMEN_CHANNEL + channel) * HCMEN_STATE + n] = state[j];
  }
#endif
}

#else

// Thread i has channel i % HCMEN_CHANNEL, and of its outputs HCMEN_STEPS in a row.
HCMEN_ENTRY void __launch_bounds__(HCMEN_THREADS)
    HCMEN_KERNEL(const Element* x, const float* weight, const float* bias,
#if HCMEN_STATEFUL
                 const float* initial_state,
#endif
                 int batch, int time, Element* y
#if HCMEN_STATEFUL
                 ,
                 float* last_state
#endif
    ) {
  const int64_t thread = (int64_t)blockIdx.x * HCMEN_THREADS + threadIdx.x;
  const int64_t runs = ((int64_t)time + HCMEN_STEPS - 1) / HCMEN_STEPS;
  if (thread >= batch * runs * HCMEN_CHANNEL) return;
  const int channel = (int)(thread % HCMEN_CHANNEL);
  const int64_t element = thread / HCMEN_CHANNEL / runs;
  const int64_t begin = thread / HCMEN_CHANNEL % runs * HCMEN_STEPS;

  float taps[HCMEN_WIDTH], window[HCMEN_WIDTH];
#pragma unroll
  for (int k = 0; k < HCMEN_WIDTH; ++k) {
    taps[k] = weight[channel * HCMEN_WIDTH + k];
    // The window of the step before the first, less its oldest value.
    const int64_t index = begin - HCMEN_WIDTH + k;
    const bool there = k > 0 && index >= 0;
    window[k] = there ? widened(x[(element * time + step::place(index, time, HCMEN_REVERSE)) * HCMEN_CHANNEL + channel])
                      : 0.0f;
#if HCMEN_STATEFUL
    if (k > 0 && index < 0) {
      window[k] = initial_state[((element + 1) * (HCMEN_WIDTH - 1) + index) * HCMEN_CHANNEL + channel];
    }
#endif
  }
  for (int64_t index = begin; index < begin + HCMEN_STEPS && index < time; ++index) {
#pragma unroll
    for (int k = 0; k + 1 < HCMEN_WIDTH; ++k) window[k] = window[k + 1];
    const int64_t at = (element * time + step::place(index, time, HCMEN_REVERSE)) * HCMEN_CHANNEL + channel;
    window[HCMEN_WIDTH - 1] = widened(x[at]);
    y[at] = narrow(step::activated(step::convolve(window, taps, bias[channel]), HCMEN_SILU));
  }
#if HCMEN_STATEFUL
  if (begin + HCMEN_STEPS < time) return;
#pragma unroll
  for (int k = 0; k + 1 < HCMEN_WIDTH; ++k) {
    last_state[(element * (HCMEN_WIDTH - 1) + k) * HCMEN_CHANNEL + channel] = window[k + 1];
  }
#endif
}

#endif
