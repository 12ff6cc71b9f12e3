// The state space dual, one head of one batch element at a time. See vector-inl.h for the rules of these files.
#ifndef HCMEN_STATE_SPACE_DUAL_INL_H_
#define HCMEN_STATE_SPACE_DUAL_INL_H_

#include "kernel_table.h"
#include "vector-inl.h"

namespace hcmen {
namespace HCMEN_ISA_NAMESPACE {

HCMEN_INLINE void widen_row(const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}
HCMEN_INLINE void widen_row(const Half* from, float* to, int64_t count) { widen_array(from, to, count); }

HCMEN_INLINE void narrow_row(const float* from, float* to, int64_t count) { widen_row(from, to, count); }
HCMEN_INLINE void narrow_row(const float* from, Half* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = count - i < kLanes ? (int)(count - i) : kLanes;
    store(to + i, load(from + i, lanes), lanes);
  }
}

// A step size from what the array holds, and its slope.
HCMEN_INLINE float step_size(const hcmen_dual& s, float dt, float bias, float* slope) {
  F d = splat(dt + bias), rise = splat(1.0f);
  if (s.delta_softplus) d = softplus(d, &rise);
  const float whole = d[0];
  const float cut = whole < s.dt_min ? s.dt_min : whole > s.dt_max ? s.dt_max : whole;
  *slope = cut == whole ? rise[0] : 0.0f;
  return cut;
}

template <class T>
static int dual_forward_of(const hcmen_dual& s, int64_t batch, int64_t head) {
  const int64_t P = s.head_dim, N = s.state, group = head / (s.head / s.group);
  Scratch scratch(0, P * N + 3 * P + 2 * N + 1);
  if (!scratch.works()) return HCMEN_NO_MEMORY;
  float *h = scratch.floats(P * N), *x = scratch.floats(P), *y = scratch.floats(P), *z = scratch.floats(P);
  float *B = scratch.floats(N), *C = scratch.floats(N), *dt = scratch.floats(1);
  const int64_t states = (batch * s.head + head) * P * N;
  for (int64_t i = 0; i < P * N; ++i) h[i] = s.initial_state ? s.initial_state[states + i] : 0.0f;
  for (int64_t k = 0; k < s.time; ++k) {
    const int64_t t = s.reverse ? s.time - 1 - k : k, row = (batch * s.time + t) * s.head + head;
    const int64_t projection = ((batch * s.time + t) * s.group + group) * N;
    widen_row((const T*)s.x + row * P, x, P);
    widen_row((const T*)s.dt + row, dt, 1);
    widen_row((const T*)s.B + projection, B, N);
    widen_row((const T*)s.C + projection, C, N);
    float slope;
    const float d = step_size(s, dt[0], s.dt_bias[head], &slope), decay = exponential(splat(d * s.A[head]))[0];
    for (int64_t p = 0; p < P; ++p) {
      float sum = 0.0f;
      for (int64_t n = 0; n < N; ++n) {
        h[p * N + n] = decay * h[p * N + n] + d * x[p] * B[n];
        sum += h[p * N + n] * C[n];
      }
      y[p] = sum + s.D[s.wide_D ? head * P + p : head] * x[p];
    }
    if (s.z) {
      widen_row((const T*)s.z + row * P, z, P);
      for (int64_t p = 0; p < P; ++p) y[p] *= silu(splat(z[p]))[0];
    }
    narrow_row(y, (T*)s.y + row * P, P);
  }
  if (s.last_state) {
    for (int64_t i = 0; i < P * N; ++i) s.last_state[states + i] = h[i];
  }
  return HCMEN_OK;
}

static int dual_forward(const hcmen_dual& s, int64_t batch, int64_t head) {
  return s.dtype == HCMEN_FLOAT16 ? dual_forward_of<Half>(s, batch, head) : dual_forward_of<float>(s, batch, head);
}

// Gradients of one head of one batch element, those of B, C, A, D and dt_bias added to what is there.
static int dual_backward(const hcmen_dual& s, const hcmen_dual_grad& grad, int64_t batch, int64_t head) {
  const int64_t P = s.head_dim, N = s.state, group = head / (s.head / s.group), size = P * N;
  Scratch scratch(0, (s.time + 2) * size + 2 * s.time);
  if (!scratch.works()) return HCMEN_NO_MEMORY;
  float *h = scratch.floats((s.time + 1) * size), *g = scratch.floats(size);
  float *steps = scratch.floats(s.time), *slopes = scratch.floats(s.time);
  const int64_t states = (batch * s.head + head) * size;
  const auto row_of = [&](int64_t k) { return (batch * s.time + (s.reverse ? s.time - 1 - k : k)) * s.head + head; };
  for (int64_t i = 0; i < size; ++i) h[i] = s.initial_state ? s.initial_state[states + i] : 0.0f;
  for (int64_t k = 0; k < s.time; ++k) {
    const int64_t row = row_of(k), projection = (row / s.head * s.group + group) * N;
    const float d = step_size(s, ((const float*)s.dt)[row], s.dt_bias[head], &slopes[k]);
    const float decay = exponential(splat(d * s.A[head]))[0], *x = (const float*)s.x + row * P;
    const float *B = (const float*)s.B + projection, *before = h + k * size;
    steps[k] = d;
    for (int64_t p = 0; p < P; ++p) {
      for (int64_t n = 0; n < N; ++n) h[(k + 1) * size + p * N + n] = decay * before[p * N + n] + d * x[p] * B[n];
    }
  }
  for (int64_t i = 0; i < size; ++i) g[i] = grad.dlast_state ? grad.dlast_state[states + i] : 0.0f;
  for (int64_t k = s.time - 1; k >= 0; --k) {
    const int64_t row = row_of(k), projection = (row / s.head * s.group + group) * N;
    const float *x = (const float*)s.x + row * P, *dy = grad.dy + row * P, *z = (const float*)s.z;
    const float *B = (const float*)s.B + projection, *C = (const float*)s.C + projection;
    const float *before = h + k * size, *after = before + size;
    float *dB = grad.dB + projection, *dC = grad.dC + projection, *dx = grad.dx + row * P;
    const float d = steps[k], decay = exponential(splat(d * s.A[head]))[0];
    float through_decay = 0.0f, through_step = 0.0f;
    for (int64_t p = 0; p < P; ++p) {
      const int64_t at = s.wide_D ? head * P + p : head;
      float dyp = dy[p], through_B = 0.0f, y = s.D[at] * x[p];
      if (z) {
        const F gate = sigmoid(splat(z[row * P + p]));
        for (int64_t n = 0; n < N; ++n) y += after[p * N + n] * C[n];
        grad.dz[row * P + p] = dyp * y * gate[0] * (1.0f + z[row * P + p] * (1.0f - gate[0]));
        dyp *= z[row * P + p] * gate[0];
      }
      grad.dD[at] += dyp * x[p];
      for (int64_t n = 0; n < N; ++n) {
        const float own = g[p * N + n] + dyp * C[n];
        dC[n] += dyp * after[p * N + n];
        dB[n] += own * d * x[p];
        through_B += own * B[n];
        through_decay += own * before[p * N + n];
        g[p * N + n] = own * decay;
      }
      through_step += through_B * x[p];
      dx[p] = dyp * s.D[at] + d * through_B;
    }
    const float ddt = (through_step + through_decay * decay * s.A[head]) * slopes[k];
    grad.dA[head] += through_decay * decay * d;
    grad.ddt[row] = ddt;
    grad.ddt_bias[head] += ddt;
  }
  for (int64_t i = 0; grad.dinitial_state && i < size; ++i) grad.dinitial_state[states + i] = g[i];
  return HCMEN_OK;
}

}  // namespace HCMEN_ISA_NAMESPACE
}  // namespace hcmen

#endif  // HCMEN_STATE_SPACE_DUAL_INL_H_
