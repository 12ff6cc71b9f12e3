// The state space dual of Mamba-2 on a CPU: what it computes, and the C functions that compute it.
//
//   d[t] = dt[t] + dt_bias, through softplus (threshold 20) if delta_softplus, then cut to [dt_min, dt_max]
//   h[t] = exp(d[t] * A) * h[t-1] + d[t] * x[t] B[t]^T       h before the first step: initial_state, or zeros
//   y[t] = h[t] C[t]  +  D * x[t],                           times silu(z[t]) if z is given
//
// d and A are one number for each head, x[t] and y[t] vectors of head_dim, h[t] a matrix of head_dim x state. t runs from
// the first step to the last, or from the last to the first if `reverse`. Head i uses group i / (head / group) of B and
// C. Arithmetic and states are float32 whatever the dtype of the inputs. Full specification: docs/op.md.
#ifndef HCMEN_STATE_SPACE_DUAL_H_
#define HCMEN_STATE_SPACE_DUAL_H_

#include <stdint.h>

#include "selective_scan.h"

#ifdef __cplusplus
extern "C" {
#endif

// All arrays are dense, row-major and caller-owned. "any" is float32 or float16 as `dtype` says.
typedef struct hcmen_dual {
  int64_t batch, time, head, head_dim, group, state;
  int32_t dtype, delta_softplus, reverse;
  int32_t wide_D;              // D is [head, head_dim], else [head]
  float dt_min, dt_max;        // dt_min <= dt_max; 0 and infinity by default in a node, and NOT in this structure
  const void* x;               // any [batch, time, head, head_dim]
  const void* dt;              // any [batch, time, head]
  const float* A;              //     [head]
  const void* B;               // any [batch, time, group, state]
  const void* C;               // any [batch, time, group, state]
  const float* D;              //     [head] or [head, head_dim]
  const float* dt_bias;        //     [head]
  const void* z;               // any [batch, time, head, head_dim], or null: not gated
  const float* initial_state;  //     [batch, head, head_dim, state], or null: zeros
  void* y;                     // any [batch, time, head, head_dim], written
  float* last_state;           //     [batch, head, head_dim, state], written unless null
} hcmen_dual;

// Gradients of a scalar loss, float32 only (`dtype` must be HCMEN_FLOAT32). Everything is overwritten.
typedef struct hcmen_dual_grad {
  const float* dy;           // [batch, time, head, head_dim]
  const float* dlast_state;  // [batch, head, head_dim, state], or null: zeros
  float* dx;                 // [batch, time, head, head_dim]
  float* ddt;                // [batch, time, head]; 0 where the step size was cut
  float* dA;                 // [head]
  float* dB;                 // [batch, time, group, state]
  float* dC;                 // [batch, time, group, state]
  float* dD;                 // of D's shape
  float* ddt_bias;           // [head]
  float* dz;                 // [batch, time, head, head_dim]; null exactly when z is null
  float* dinitial_state;     // [batch, head, head_dim, state], or null: not wanted
} hcmen_dual_grad;

// `threads` >= 1. Results do not depend on `threads`, bit for bit. `y` and `last_state` are not read by the backward pass
// and may be null there.
HCMEN_API int hcmen_state_space_dual_forward(const hcmen_dual* dual, int threads);
HCMEN_API int hcmen_state_space_dual_backward(const hcmen_dual* dual, const hcmen_dual_grad* grad, int threads);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // HCMEN_STATE_SPACE_DUAL_H_
