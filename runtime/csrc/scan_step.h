// The arithmetic of the selective scan and of the causal convolution, once, for host and device: what happens in one
// step of one channel, forward and backward, and how a long sequence is put together from chunks. The CUDA kernels
// include it; tests/mamba/test_scan_step.py compiles it for the host and holds it to the reference in float64.
//
// Everything is float32. Decay rates are kept as A * log2(e), so that a decay is one power of two. Functions are
// written so that what they lose is below the 1e-6 of the largest output that docs/op.md promises:
//
//   decay     2^(d * rate): on a device the hardware's ex2, off by at most 2^-22 of its value
//   softplus  max(x, 0) + log1p(exp(-|x|)). Above the threshold of 20 the second part is less than half a unit in the
//             last place of the first, so the sum is x to the bit, as the definition asks
//   silu      z / (1 + exp(-z))
//
// A masked step has d = 0: its decay is exactly 1 and it adds exactly 0, so it leaves a state as it was.
#ifndef HCMEN_SCAN_STEP_H_
#define HCMEN_SCAN_STEP_H_

#if !defined(__CUDACC_RTC__)
#include <math.h>
#include <stdint.h>
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define HCMEN_HD __host__ __device__ __forceinline__
#else
#define HCMEN_HD inline
#endif

// Loops that must unroll on a device, so that arrays stay in registers; a host compiler need not know.
#if defined(__CUDA_ARCH__)
#define HCMEN_UNROLL _Pragma("unroll")
#else
#define HCMEN_UNROLL
#endif

namespace hcmen {
namespace step {

constexpr float kLog2e = 1.44269504089f;        // to the nearest float32
constexpr float kLog2eRest = 1.92596299e-08f;   // log2(e) - kLog2e
constexpr float kLn2 = 0.69314718056f;

// 2^x. Subnormal results may come out as zero.
HCMEN_HD float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// a / b for |b| < 2^126.
HCMEN_HD float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// exp(-|x|), in [0, 1]: the rounding of x * log2(e) is made good, which at x = -10 would cost five units in the last
// place.
HCMEN_HD float exp_of_minus_size(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float size;
  asm("min.NaN.f32 %0, %1, 0f43160000;" : "=f"(size) : "f"(fabsf(x)));  // one instruction, where the other takes three
#else
  const float size = fabsf(x) > 150.0f ? 150.0f : fabsf(x);  // written so that NaN stays NaN
#endif
  const float power = -size * kLog2e;
  const float rest = fmaf(-size, kLog2e, -power) - size * kLog2eRest;
  const float value = power_of_two(power);
  return fmaf(value, rest * kLn2, value);
}

// log(1 + e) for e in [0, 1], to 1.4 units in the last place: the interpolating polynomial of log1p(e) / e at the
// Chebyshev points.
HCMEN_HD float log1p_of_unit(float e) {
  float p = 0x1.046678p-9f;
  p = fmaf(p, e, -0x1.b02380p-7f);
  p = fmaf(p, e, 0x1.4fed04p-5f);
  p = fmaf(p, e, -0x1.4f61d4p-4f);
  p = fmaf(p, e, 0x1.fb00b2p-4f);
  p = fmaf(p, e, -0x1.49797ap-3f);
  p = fmaf(p, e, 0x1.9742f8p-3f);
  p = fmaf(p, e, -0x1.ffb934p-3f);
  p = fmaf(p, e, 0x1.555324p-2f);
  p = fmaf(p, e, -0x1.fffff2p-2f);
  p = fmaf(p, e, 1.0f);
  return p * e;
}

HCMEN_HD float softplus(float x) { return (x > 0.0f ? x : 0.0f) + log1p_of_unit(exp_of_minus_size(x)); }

// 1 / (1 + exp(-x)), the derivative of softplus.
HCMEN_HD float sigmoid(float x) {
  const float e = exp_of_minus_size(x);
  return quotient(x < 0.0f ? e : 1.0f, 1.0f + e);
}

HCMEN_HD float silu(float z) { return z * sigmoid(z); }

// The derivative of silu.
HCMEN_HD float silu_slope(float z) {
  const float e = exp_of_minus_size(z), larger = quotient(1.0f, 1.0f + e), smaller = e * larger;
  return z < 0.0f ? smaller * fmaf(z, larger, 1.0f) : larger * fmaf(z, smaller, 1.0f);
}

// The step size from what the model gives.
HCMEN_HD float step_size(float delta, float bias, bool through_softplus) {
  const float x = delta + bias;
  return through_softplus ? softplus(x) : x;
}

// `size` cut to [least, most]; NaN stays NaN.
HCMEN_HD float limited(float size, float least, float most) {
  const float enough = size < least ? least : size;
  return enough > most ? most : enough;
}

// --- forward --------------------------------------------------------------------------------------------------------

// One state over one step. `input` is d * u.
HCMEN_HD float advance(float state, float d, float rate, float input, float B) {
  return fmaf(power_of_two(d * rate), state, input * B);
}

// exp(d * A), to two units in the last place and what 2^x is off by: for a decay that many states share, and that is worth
// more than `advance` spends on each of its own. The roundings of d * A and of its way to base two are made good, which
// at d * A = -10 would cost ten units. Where it is next to nothing, or too large, they do not matter.
HCMEN_HD float decay(float d, float A) {
  const float product = d * A, power = product * kLog2e;
  const float value = power_of_two(power);
  if (fabsf(product) > 87.0f) return value;
  const float rest = fmaf(product, kLog2e, -power) + fmaf(product, kLog2eRest, fmaf(d, A, -product) * kLog2e);
  return fmaf(value, rest * kLn2, value);
}

// The output of a step from the sum over states of C * h. z only if gated.
HCMEN_HD float output(float sum, float u, float D, bool gated, float z) {
  const float y = fmaf(D, u, sum);
  return gated ? y * silu(z) : y;
}

// Consecutive steps taken together: the state after them is decay * (state before) + end, where `end` is what they make
// of a zero state, and `steps` the sum of their step sizes: their decay is 2^(rate * steps), for every state.
struct Chunk {
  float steps;
  float end;
};

HCMEN_HD float after(Chunk chunk, float rate, float state) {
  return fmaf(power_of_two(rate * chunk.steps), state, chunk.end);
}

// --- backward -------------------------------------------------------------------------------------------------------
//
// With s the gradient of y before the gate and g that of the state after a step:
//
//   g += C s;  dC = s h;  dB = g d u;  dA += d decay h_before g;  g of the step before = decay g
//   gradient of d = sum over states of g (A decay h_before + B u)
//   du = D s + d * (sum over states of g B)

// The step size from what the model gives, and its slope by that.
struct StepSize {
  float size, slope;
};

HCMEN_HD StepSize step_size_and_slope(float delta, float bias, bool through_softplus) {
  const float x = delta + bias;
  if (!through_softplus) return {x, 1.0f};
  const float e = exp_of_minus_size(x);
  return {(x > 0.0f ? x : 0.0f) + log1p_of_unit(e), quotient(x < 0.0f ? e : 1.0f, 1.0f + e)};
}

// silu and its derivative.
struct Gate {
  float value, slope;
};

HCMEN_HD Gate gate(float z) {
  const float e = exp_of_minus_size(z), larger = quotient(1.0f, 1.0f + e), smaller = e * larger;
  const bool negative = z < 0.0f;
  const float sigmoid = negative ? smaller : larger;
  return {z * sigmoid, sigmoid * fmaf(z, negative ? larger : smaller, 1.0f)};
}

// One state over one step, backward. `input` is d * u; `g` comes in as the gradient of the state after the step from
// later steps and goes out as that of `before`. The rest is added to: dA; dB, a sum over channels; and sums over states
// of g B and of g decay before rate, which times ln 2 is the part of A in the gradient of d.
HCMEN_HD void retreat(float before, float d, float input, float s, float rate, float B, float C, float& g, float& dA,
                      float& dB, float& through, float& decayed) {
  g = fmaf(C, s, g);
  dB = fmaf(g, input, dB);
  through = fmaf(g, B, through);
  g *= power_of_two(d * rate);
  const float kept = g * before;
  decayed = fmaf(kept, rate, decayed);
  dA = fmaf(d, kept, dA);
}

// --- causal convolution ---------------------------------------------------------------------------------------------

// `window` holds the `width` inputs up to the current one, which comes last.
template <int kWidth>
HCMEN_HD float convolve(const float (&window)[kWidth], const float (&weight)[kWidth], float bias) {
  float sum = bias;
  HCMEN_UNROLL
  for (int k = 0; k < kWidth; ++k) sum = fmaf(weight[k], window[k], sum);
  return sum;
}

HCMEN_HD float activated(float v, bool through_silu) { return through_silu ? silu(v) : v; }
HCMEN_HD float activated_slope(float v, bool through_silu) { return through_silu ? silu_slope(v) : 1.0f; }

// --- both directions of time ----------------------------------------------------------------------------------------

// The place in time of the step that is scanned as number `index`.
HCMEN_HD int64_t place(int64_t index, int64_t time, bool reverse) { return reverse ? time - 1 - index : index; }

}  // namespace step
}  // namespace hcmen

#endif  // HCMEN_SCAN_STEP_H_
