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

#ifdef __cplusplus
extern "C" {
#endif

enum { HCMEN_FLOAT32 = 0, HCMEN_FLOAT16 = 1 };

// Return values of every function of the C interface.
enum {
  HCMEN_OK = 0,
  HCMEN_BAD_ARGUMENT = 1,  // a null pointer, a size below 1, a dtype or a group that does not fit
  HCMEN_NO_MEMORY = 2,
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
int hcmen_selective_scan_forward(const hcmen_scan* scan, int threads);
int hcmen_selective_scan_backward(const hcmen_scan* scan, const hcmen_scan_grad* grad, int threads);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // HCMEN_SELECTIVE_SCAN_H_
