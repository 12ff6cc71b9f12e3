// Depthwise causal convolution over time, channels last, on a CPU.
//
//   y[t] = activation(bias + sum over k of weight[k] * x[t - (width - 1) + k])      x outside the array: zero
//
// `reverse` mirrors time: y[t] = activation(bias + sum over k of weight[k] * x[t + (width - 1) - k]).
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
  const void* x;        // any [batch, time, channel]
  const float* weight;  //     [channel, width]
  const float* bias;    //     [channel]
  void* y;              // any [batch, time, channel], written
} hcmen_conv;

// float32 only; everything is overwritten.
typedef struct hcmen_conv_grad {
  const float* dy;  // [batch, time, channel]
  float* dx;        // [batch, time, channel]
  float* dweight;   // [channel, width]
  float* dbias;     // [channel]
} hcmen_conv_grad;

// Return values as in selective_scan.h. Results do not depend on `threads`, bit for bit.
HCMEN_API int hcmen_causal_conv1d_forward(const hcmen_conv* conv, int threads);
HCMEN_API int hcmen_causal_conv1d_backward(const hcmen_conv* conv, const hcmen_conv_grad* grad, int threads);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // HCMEN_CAUSAL_CONV1D_H_
