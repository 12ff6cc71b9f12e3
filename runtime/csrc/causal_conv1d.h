// Depthwise causal convolution over time, channels last, on a CPU.
//
//   y[t] = activation(bias + sum over k of weight[k] * x[t - (width - 1) + k])      x outside the array: zero
//
// `reverse` mirrors time: y[t] = activation(bias + sum over k of weight[k] * x[t + (width - 1) - k]).
//
// A state is the width - 1 inputs before a step, in the order they are scanned: `reverse` does not turn it round. With
// `last_state` of one call as `initial_state` of the next, outputs are those of one call over all steps, bit for bit.
#ifndef HCMEN_CAUSAL_CONV1D_H_
#define HCMEN_CAUSAL_CONV1D_H_

#include <stdint.h>

#include "selective_scan.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct hcmen_conv {
  int64_t batch, time, channel, width;
  int32_t dtype, silu, reverse, reserved;
  const void* x;               // any [batch, time, channel]
  const float* weight;         //     [channel, width]
  const float* bias;           //     [channel]
  const float* initial_state;  //     [batch, width - 1, channel], or null: zeros
  void* y;                     // any [batch, time, channel], written
  float* last_state;           //     [batch, width - 1, channel], written unless null; not `initial_state`
} hcmen_conv;

// float32 only; everything is overwritten.
typedef struct hcmen_conv_grad {
  const float* dy;           // [batch, time, channel]
  const float* dlast_state;  // [batch, width - 1, channel], or null: zeros
  float* dx;                 // [batch, time, channel]
  float* dweight;            // [channel, width]
  float* dbias;              // [channel]
  float* dinitial_state;     // [batch, width - 1, channel], or null: not wanted
} hcmen_conv_grad;

// Return values as in selective_scan.h. Results do not depend on `threads`, bit for bit. `y` and `last_state` of `conv`
// are not read by the backward pass and may be null there. With a width of 1 there is no state: a pointer to one must
// be null.
HCMEN_API int hcmen_causal_conv1d_forward(const hcmen_conv* conv, int threads);
HCMEN_API int hcmen_causal_conv1d_backward(const hcmen_conv* conv, const hcmen_conv_grad* grad, int threads);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // HCMEN_CAUSAL_CONV1D_H_
