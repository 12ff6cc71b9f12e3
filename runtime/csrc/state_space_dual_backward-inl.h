// Gradients of the state space dual, vectorised over states like the forward pass. See vector-inl.h for the rules.
//
// With g[t] the gradient of the state after step t, and s[t] that of y before the gate,
//
//   g[t]   = s[t] C[t]^T + decay[t+1] g[t+1]                     g after the last step: dlast_state
//   dC[t]  = sum over p of s[t] h[t]
//   dB[t]  = sum over p of g[t] d[t] x[t]
//   dA     = sum over time of d[t] decay[t] e[t],                e[t] = sum over p and n of h[t-1] g[t]
//   gradient of d[t] = A decay[t] e[t] + sum over p of x[t] (g[t] B[t])
//   dx[t]  = D s[t] + d[t] (g[t] B[t])
//
// Rows never meet, so kLanes of them go through all of time before the next ones do. Their states are kept at the start
// of every chunk by one sweep forward; then the chunks are taken from the last to the first, each recomputed.
#ifndef HCMEN_STATE_SPACE_DUAL_BACKWARD_INL_H_
#define HCMEN_STATE_SPACE_DUAL_BACKWARD_INL_H_

#include "state_space_dual-inl.h"

namespace hcmen {
namespace HCMEN_ISA_NAMESPACE {

constexpr int kDualGradRows = 2;
#if defined(__AVX512F__) || defined(HCMEN_NEON)
constexpr int kDualGradVectors = 4;
#else
constexpr int kDualGradVectors = 2;
#endif

// Step sizes of one head, [step]: with their slopes, and what is summed up for their gradients.
struct DualGradSteps {
  float *d, *decay, *slope, *through_step, *through_decay;
};

static void dual_grad_steps(const hcmen_dual& s, int64_t batch, int64_t head, DualGradSteps to) {
  const F bias = splat(s.dt_bias[head]), rate = splat(s.A[head]) * kLog2e;
  for (int64_t k = 0; k < s.time; k += kLanes) {
    const int lanes = lanes_at(k, s.time);
    float raw[kLanes] = {};
    for (int j = 0; j < lanes; ++j) {
      const int64_t t = s.reverse ? s.time - 1 - k - j : k + j;
      raw[j] = ((const float*)s.dt)[(batch * s.time + t) * s.head + head];
    }
    F whole = load(raw) + bias, slope = splat(1.0f);
    if (s.delta_softplus) whole = softplus(whole, &slope);
    const F d = lesser(splat(s.dt_max), greater(splat(s.dt_min), whole));
    store(to.d + k, d, lanes);
    store(to.decay + k, exp2_product<true>(d, rate), lanes);
    store(to.slope + k, (F)((I)slope & (d == whole)), lanes);
    store(to.through_step + k, F{}, lanes);
    store(to.through_decay + k, F{}, lanes);
  }
}

// One chunk of kLanes rows, whose numbers lie [step][row].
struct DualGradChunk {
  const float* decay;
  const float *dx, *dy;  // d x, and the gradient of y before the gate
  const float *B, *C;
  int64_t projection;  // between steps of B and C
  float *dB, *dC;
  int64_t row;       // between steps of dB and dC
  const float* start;  // states before the chunk
  float* carry;        // decay * g of the step after it in, of its own first step out
  int64_t states;      // between rows of both
  F *y, *through_B;    // sums over n, [step][row]
  F* through_decay;    // [step], of all rows
};

// Some rows and vectors of states of a chunk; the pointers of `c` are at the first of them.
template <int rows, int vectors>
HCMEN_APART void dual_grad_tile(int64_t steps, const DualGradChunk& c) {
  F before[(kDualSteps + 1) * rows * vectors];
  F h[rows][vectors];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) before[r * vectors + v] = h[r][v] = load(c.start + r * c.states + v * kLanes);
  }
  for (int64_t k = 0; k < steps; ++k) {
    const float *b = c.B + k * c.projection, *out = c.C + k * c.projection;
    const F decay = splat(c.decay[k]);
    F* const after = before + (k + 1) * rows * vectors;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const F dx = splat(c.dx[k * kLanes + r]);
      F sum = c.y[k * kLanes + r];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        after[r * vectors + v] = h[r][v] = fma(dx, load(b + v * kLanes), decay * h[r][v]);
        sum = fma(h[r][v], load(out + v * kLanes), sum);
      }
      c.y[k * kLanes + r] = sum;
    }
  }
  F g[rows][vectors];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) g[r][v] = load(c.carry + r * c.states + v * kLanes);
  }
  for (int64_t k = steps - 1; k >= 0; --k) {
    const F decay = splat(c.decay[k]);
    const F* const now = before + k * rows * vectors;
    F dx[rows], dy[rows], through_B[rows], through_decay = c.through_decay[k];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      dx[r] = splat(c.dx[k * kLanes + r]);
      dy[r] = splat(c.dy[k * kLanes + r]);
      through_B[r] = c.through_B[k * kLanes + r];
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const F b = load(c.B + k * c.projection + v * kLanes), out = load(c.C + k * c.projection + v * kLanes);
      F dB = load(c.dB + k * c.row + v * kLanes), dC = load(c.dC + k * c.row + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const F own = fma(dy[r], out, g[r][v]);
        dC = fma(dy[r], now[(rows + r) * vectors + v], dC);
        dB = fma(own, dx[r], dB);
        through_B[r] = fma(own, b, through_B[r]);
        through_decay = fma(own, now[r * vectors + v], through_decay);
        g[r][v] = own * decay;
      }
      store(c.dB + k * c.row + v * kLanes, dB);
      store(c.dC + k * c.row + v * kLanes, dC);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) c.through_B[k * kLanes + r] = through_B[r];
    c.through_decay[k] = through_decay;
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(c.carry + r * c.states + v * kLanes, g[r][v]);
  }
}

template <int rows>
HCMEN_INLINE void dual_grad_tile_of(int vectors, int64_t steps, const DualGradChunk& c) {
  switch (vectors) {
    case 1: dual_grad_tile<rows, 1>(steps, c); break;
    case 2: dual_grad_tile<rows, 2>(steps, c); break;
#if defined(__AVX512F__) || defined(HCMEN_NEON)
    case 3: dual_grad_tile<rows, 3>(steps, c); break;
    case 4: dual_grad_tile<rows, 4>(steps, c); break;
#endif
  }
}

HCMEN_INLINE void dual_grad_tiles(int64_t rows, int64_t vectors, int64_t steps, const DualGradChunk& chunk) {
  for (int64_t v = 0; v < vectors;) {
    const int64_t tiles = (vectors - v + kDualGradVectors - 1) / kDualGradVectors, n = v * kLanes;
    const int size = (int)((vectors - v + tiles - 1) / tiles);
    for (int64_t r = 0; r < rows;) {
      DualGradChunk c = chunk;
      c.dx += r, c.dy += r, c.y += r, c.through_B += r;
      c.B += n, c.C += n, c.dB += n, c.dC += n;
      c.start += r * c.states + n, c.carry += r * c.states + n;
      if (rows - r >= kDualGradRows) {
        dual_grad_tile_of<kDualGradRows>(size, steps, c);
        r += kDualGradRows;
      } else {
        dual_grad_tile_of<1>(size, steps, c);
        ++r;
      }
    }
    v += size;
  }
}

// The sum over the lanes of each of kLanes vectors.
HCMEN_INLINE F sums_of_rows(const F* rows) {
  F own[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) own[r] = rows[r];
  return sums_of_lanes(own);
}

// One head of one batch element.
static int dual_backward(const hcmen_dual& s, const hcmen_dual_grad& grad, const DualGradTargets& to, int64_t batch,
                         int64_t head) {
  const int64_t vectors = vectors_of(s.state), stride = vectors * kLanes, width = s.head * s.head_dim;
  const int64_t chunk = s.time < kDualSteps ? s.time : kDualSteps, chunks = (s.time + chunk - 1) / chunk;
  const int64_t group = head / (s.head / s.group), block = kLanes * stride;
  Scratch scratch(2 * chunk * kLanes + chunk, (chunks + 1) * block + 2 * chunk * (kLanes + stride) + 5 * s.time);
  if (!scratch.works()) return HCMEN_NO_MEMORY;
  F* const y = scratch.vectors(chunk * kLanes);
  F* const through_B = scratch.vectors(chunk * kLanes);
  F* const through_decay = scratch.vectors(chunk);
  float* const starts = scratch.floats(chunks * block);  // [chunk][row][n]
  float* const carry = scratch.floats(block);
  float* const dx = scratch.floats(chunk * kLanes);
  float* const dy = scratch.floats(chunk * kLanes);
  float* const B_copy = scratch.floats(chunk * stride);
  float* const C_copy = scratch.floats(chunk * stride);
  float* const per_step = scratch.floats(5 * s.time);
  const DualGradSteps all = {per_step, per_step + s.time, per_step + 2 * s.time, per_step + 3 * s.time,
                             per_step + 4 * s.time};
  dual_grad_steps(s, batch, head, all);
  const int64_t padded = (s.state + kDualPadding - 1) / kDualPadding * kDualPadding;
  for (int64_t i = 0; i < s.time * padded; ++i) to.dB[i] = to.dC[i] = 0.0f;
  float dD = 0.0f;

  for (int64_t p = 0; p < s.head_dim; p += kLanes) {
    const int lanes = lanes_at(p, s.head_dim);
    const int64_t offset = head * s.head_dim + p, states = ((batch * s.head + head) * s.head_dim + p) * s.state;
    const F skip = s.wide_D ? load(s.D + offset, lanes) : splat(s.D[head]);
    const auto series = [&](auto* array, int64_t start, int64_t size, int64_t at) {
      return dual_series(array, s, batch, start, size, at);
    };
    const auto project = [&](const void* array, int64_t start, int64_t steps, float* copy) {
      const auto rows = series((const float*)array, start, s.group * s.state, group * s.state);
      return dual_project<float>(rows, steps, 0, s.state, copy);
    };
    // What the tiles read of a chunk of x.
    const auto open = [&](int64_t start, int64_t steps) {
      const auto x = series((const float*)s.x, start, width, offset);
      for (int64_t k = 0; k < steps; ++k) {
        store(dx + k * kLanes, splat(all.d[start + k]) * load(x.first + k * x.stride, lanes));
      }
    };
    const auto pad = [&](const float* from, float* to_rows) {
      for (int r = 0; r < kLanes; ++r) {
        for (int64_t n = 0; n < stride; n += kLanes) {
          const bool there = from && r < lanes && n < s.state;
          store(to_rows + r * stride + n, there ? load(from + r * s.state + n, lanes_at(n, s.state)) : F{});
        }
      }
    };

    pad(s.initial_state ? s.initial_state + states : nullptr, starts);
    for (int64_t i = 0; i + 1 < chunks; ++i) {
      const int64_t start = i * chunk;
      open(start, chunk);
      const DualProjection B = project(s.B, start, chunk, B_copy);
      for (int64_t v = 0; v < vectors;) {
        const int size = vectors - v < kDualVectors ? (int)(vectors - v) : kDualVectors;
        const int64_t n = v * kLanes;
        const DualInputs in = {all.decay + start, B.row + n, B.row + n, dx, B.stride, kLanes};
        dual_tiles_of<false>(size, lanes, chunk, in, {starts + i * block + n, starts + (i + 1) * block + n, stride, kLanes},
                             y);
        v += size;
      }
    }

    pad(grad.dlast_state ? grad.dlast_state + states : nullptr, carry);
    F dD_rows = {};
    for (int64_t i = chunks - 1; i >= 0; --i) {
      const int64_t start = i * chunk, steps = s.time - start < chunk ? s.time - start : chunk;
      const auto x = series((const float*)s.x, start, width, offset);
      const auto z = series((const float*)s.z, start, width, offset);
      const auto dy_rows = series(grad.dy, start, width, offset);
      const auto dx_rows = series(grad.dx, start, width, offset);
      const auto dz_rows = series(grad.dz, start, width, offset);
      const int64_t row = s.reverse ? -padded : padded, at = (s.reverse ? s.time - 1 - start : start) * padded;
      open(start, steps);
      const DualProjection B = project(s.B, start, steps, B_copy), C = project(s.C, start, steps, C_copy);
      for (int64_t k = 0; k < steps; ++k) {
        F own = load(dy_rows.first + k * dy_rows.stride, lanes);
        if (s.z) own *= silu(load(z.first + k * z.stride, lanes));
        store(dy + k * kLanes, own);
        dD_rows = fma(own, load(x.first + k * x.stride, lanes), dD_rows);
        for (int r = 0; r < kLanes; ++r) y[k * kLanes + r] = through_B[k * kLanes + r] = F{};
        through_decay[k] = F{};
      }
      dual_grad_tiles(lanes, vectors, steps,
                      {all.decay + start, dx, dy, B.row, C.row, B.stride, to.dB + at, to.dC + at, row,
                       starts + i * block, carry, stride, y, through_B, through_decay});
      for (int64_t k = 0; k < steps; ++k) {
        const F xk = load(x.first + k * x.stride, lanes), into_B = sums_of_rows(through_B + k * kLanes);
        store(dx_rows.first + k * dx_rows.stride,
              fma(splat(all.d[start + k]), into_B, skip * load(dy + k * kLanes)), lanes);
        if (s.z) {
          const F out = fma(skip, xk, sums_of_rows(y + k * kLanes)), zk = load(z.first + k * z.stride, lanes);
          const F gate = sigmoid(zk), slope = gate * fma(zk, 1.0f - gate, splat(1.0f));
          store(dz_rows.first + k * dz_rows.stride, load(dy_rows.first + k * dy_rows.stride, lanes) * slope * out,
                lanes);
        }
        all.through_step[start + k] += horizontal_sum(xk * into_B);
        all.through_decay[start + k] += horizontal_sum(through_decay[k]);
      }
    }
    if (s.wide_D) {
      store(to.dD + p, dD_rows, lanes);
    } else {
      dD += horizontal_sum(dD_rows);
    }
    for (int r = 0; grad.dinitial_state && r < lanes; ++r) {
      for (int64_t n = 0; n < s.state; n += kLanes) {
        store(grad.dinitial_state + states + r * s.state + n, load(carry + r * stride + n), lanes_at(n, s.state));
      }
    }
  }

  if (!s.wide_D) *to.dD = dD;
  double dA = 0.0, dbias = 0.0;
  for (int64_t k = 0; k < s.time; ++k) {
    const float moved = all.decay[k] * all.through_decay[k];
    const float own = (s.A[head] * moved + all.through_step[k]) * all.slope[k];
    dA += all.d[k] * moved;
    dbias += own;
    const int64_t t = s.reverse ? s.time - 1 - k : k;
    grad.ddt[(batch * s.time + t) * s.head + head] = own;
  }
  *to.dA = (float)dA;
  *to.ddt_bias = (float)dbias;
  return HCMEN_OK;
}

}  // namespace HCMEN_ISA_NAMESPACE
}  // namespace hcmen

#endif  // HCMEN_STATE_SPACE_DUAL_BACKWARD_INL_H_
