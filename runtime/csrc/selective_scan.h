// The selective scan on a CPU: what it computes, and the C functions that compute it.
//
//   d[t]    = delta[t] + delta_bias, through softplus (threshold 20) if delta_softplus
//   h[t]    = exp(d[t] * A) * h[t-1] + d[t] * B[t] * u[t]        h before the first step: initial_state, or zeros
//   y[t]    = sum over states of C[t] * h[t]  +  D * u[t],       times silu(z[t]) if z is given
//
// t runs from the first step to the last, or from the last to the first if `reverse`. Channel c uses group
// c / (channel / group) of B and C. Arithmetic and states are float32 whatever the dtype of the inputs.
// Full specification: docs/op.md.
#ifndef HCMEN_SELECTIVE_SCAN_H_
#define HCMEN_SELECTIVE_SCAN_H_

#include <stdint.h>

// The library is built with hidden visibility; these functions are what it shows.
#if defined(__GNUC__)
#define HCMEN_API __attribute__((visibility("default")))
#else
#define HCMEN_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { HCMEN_FLOAT32 = 0, HCMEN_FLOAT16 = 1 };

// Return values of every function of the C interface.
enum {
  HCMEN_OK = 0,
  HCMEN_BAD_ARGUMENT = 1,  // a null pointer, a size below 1, a dtype or a group that does not fit
  HCMEN_NO_MEMORY = 2,
  HCMEN_BAD_ISA = 3,  // the environment variable HCMEN_ISA asks for what cannot be had: see hcmen_ops_problem
};

// All arrays are dense, row-major and caller-owned. "any" is float32 or float16 as `dtype` says.
typedef struct hcmen_scan {
  int64_t batch, time, channel, state, group;
  int32_t dtype, delta_softplus, reverse, reserved;
  const void* u;               // any [batch, time, channel]
  const void* delta;           // any [batch, time, channel]
  const float* A;              //     [channel, state]
  const void* B;               // any [batch, time, group, state]
  const void* C;               // any [batch, time, group, state]
  const float* D;              //     [channel]
  const float* delta_bias;     //     [channel]
  const void* z;               // any [batch, time, channel], or null: not gated
  const float* initial_state;  //     [batch, channel, state], or null: zeros
  void* y;                     // any [batch, time, channel], written
  float* last_state;           //     [batch, channel, state], written unless null
} hcmen_scan;

// Gradients of a scalar loss, float32 only (`dtype` of the scan must be HCMEN_FLOAT32). Everything is overwritten.
typedef struct hcmen_scan_grad {
  const float* dy;           // [batch, time, channel]
  const float* dlast_state;  // [batch, channel, state], or null: zeros
  float* du;                 // [batch, time, channel]
  float* ddelta;             // [batch, time, channel]
  float* dA;                 // [channel, state]
  float* dB;                 // [batch, time, group, state]
  float* dC;                 // [batch, time, group, state]
  float* dD;                 // [channel]
  float* ddelta_bias;        // [channel]
  float* dz;                 // [batch, time, channel]; null exactly when z is null
  float* dinitial_state;     // [batch, channel, state], or null: not wanted
} hcmen_scan_grad;

// `threads` >= 1. Results do not depend on `threads`, bit for bit. `y` and `last_state` of `scan` are not read by the
// backward pass and may be null there.
HCMEN_API int hcmen_selective_scan_forward(const hcmen_scan* scan, int threads);
HCMEN_API int hcmen_selective_scan_backward(const hcmen_scan* scan, const hcmen_scan_grad* grad, int threads);

// The version of this C interface.
#define HCMEN_OPS_VERSION 2
HCMEN_API int hcmen_ops_version(void);

// The instruction set in use: "avx512", "avx2" or "baseline", and on aarch64 "neon". It is the best this machine has,
// unless the environment variable HCMEN_ISA names another one (read once, at the first call of any function). If
// HCMEN_ISA names one that is unknown or that the machine lacks, this is null, hcmen_ops_problem says so in one line,
// and every function that computes returns HCMEN_BAD_ISA; otherwise hcmen_ops_problem is null.
HCMEN_API const char* hcmen_ops_isa(void);
HCMEN_API const char* hcmen_ops_problem(void);

// For benchmarks: computes `rounds` rounds of independent exponentials in registers, with the code of the scan, and
// returns how many elements that were. The rate is the ceiling of what a scan on this machine can reach.
HCMEN_API int64_t hcmen_exp_loop(int64_t rounds);

// For tests: y[i] = f(x[i]), where `function` is 0 exp, 1 softplus, 2 silu, 3 sigmoid, 4 2^x as the scan computes it,
// 5 the same without range checks (|x| < 100).
HCMEN_API int hcmen_evaluate(int function, const float* x, float* y, int64_t count);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // HCMEN_SELECTIVE_SCAN_H_
