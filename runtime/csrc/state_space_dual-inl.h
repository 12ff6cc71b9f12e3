// The state space dual, vectorised over states. See vector-inl.h for the rules of these files.
#ifndef HCMEN_STATE_SPACE_DUAL_INL_H_
#define HCMEN_STATE_SPACE_DUAL_INL_H_

#include "kernel_table.h"
#include "vector-inl.h"

namespace hcmen {
namespace HCMEN_ISA_NAMESPACE {

// --- forward --------------------------------------------------------------------------------------------------------
//
// A row of the state, all n of one p, never meets another one. Lanes are states, and rows by vectors of states form tiles
// whose states stay in registers for kDualSteps steps. A state is rounded to float32 after every step and a sum over n
// has one order, so results are the same bits however a sequence is cut into calls. (Chunks as matrix products would
// save a third of the arithmetic, and that.)

// Steps of one round.
constexpr int kDualSteps = 16;

// States that go through time together, as bytes: many heads read whole rows of memory, and keep their states in the
// second-level cache.
constexpr int64_t kDualTogether = 1 << 20;

// Vectors of states that a tile holds: those of one row at most, and of all its rows.
constexpr int kDualVectors = 8;
#if defined(__AVX512F__) || defined(HCMEN_NEON)
constexpr int kDualTile = 16;
#else
constexpr int kDualTile = 8;
#endif
constexpr int dual_rows(int vectors) { return kDualTile / vectors < 8 ? kDualTile / vectors : 8; }

HCMEN_INLINE float one(const float* p) { return *p; }
HCMEN_INLINE float one(const Half* p) { return load(p, 1)[0]; }

HCMEN_INLINE int64_t vectors_of(int64_t count) { return (count + kLanes - 1) / kLanes; }
HCMEN_INLINE int lanes_at(int64_t i, int64_t count) { return count - i < kLanes ? (int)(count - i) : kLanes; }

// Step sizes and decays of some heads and steps, [head][step].
template <class T>
HCMEN_APART void dual_sizes(const hcmen_dual& s, int64_t batch, int64_t head, int64_t heads, int64_t start,
                            int64_t steps, float* sizes, float* decays) {
  int64_t k = 0;
  for (int64_t i = 0; i < heads * steps; i += kLanes) {
    float raw[kLanes] = {}, bias[kLanes] = {}, rate[kLanes] = {};
    const int lanes = lanes_at(i, heads * steps);
    for (int j = 0; j < lanes; ++j) {
      const int64_t t = s.reverse ? s.time - 1 - start - k : start + k;
      raw[j] = one((const T*)s.dt + (batch * s.time + t) * s.head + head);
      bias[j] = s.dt_bias[head];
      rate[j] = s.A[head];
      if (++k == steps) k = 0, ++head;
    }
    F d = load(raw) + load(bias);
    if (s.delta_softplus) d = softplus(d);
    d = lesser(splat(s.dt_max), greater(splat(s.dt_min), d));  // d second: a NaN stays
    store(sizes + i, d, lanes);
    store(decays + i, exp2_product<true>(d, load(rate) * kLog2e), lanes);
  }
}

// Rows of states on their way through some steps: `from` may be `to`, and null means zeros. `sums` has kLanes rows for
// each step, of which these are some; B, C and dx have their own strides between steps.
struct DualRows {
  const float* from;
  float* to;
  int64_t stride;  // between rows
  int last;        // lanes of the last vector of a row
};
struct DualInputs {
  const float* decay;
  const float *B, *C;
  const float* dx;
  int64_t projection, width;  // between steps: of B and C, of dx
};

template <int rows, int vectors, bool more>
HCMEN_APART void dual_tile(int64_t steps, const DualInputs& inputs, const DualRows& states, F* sums) {
  DualInputs in = inputs;
  F h[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const int lanes = v == vectors - 1 ? states.last : kLanes;
      h[r][v] = states.from ? load(states.from + r * states.stride + v * kLanes, lanes) : F{};
      if (states.from) prefetch(states.from + (rows + r) * states.stride + v * kLanes);
    }
  }
  for (int64_t k = 0; k < steps; ++k, in.B += in.projection, in.C += in.projection, in.dx += in.width, sums += kLanes) {
    const F decay = splat(in.decay[k]);
    F sum[rows], dx[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) dx[r] = splat(in.dx[r]);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const F b = load(in.B + v * kLanes), c = load(in.C + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        h[r][v] = fma(dx[r], b, decay * h[r][v]);
        sum[r] = v ? fma(h[r][v], c, sum[r]) : more ? fma(h[r][v], c, sums[r]) : h[r][v] * c;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) sums[r] = sum[r];
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const int lanes = v == vectors - 1 ? states.last : kLanes;
      store(states.to + r * states.stride + v * kLanes, h[r][v], lanes);
    }
  }
}

// A single step of many rows, whose states pass through: B and C stay in registers instead.
template <int vectors, bool more>
HCMEN_APART void dual_step(int64_t rows, const DualInputs& in, const DualRows& all, F* sums) {
  DualRows states = all;
  const F decay = splat(in.decay[0]);
  F b[vectors], c[vectors];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) b[v] = load(in.B + v * kLanes), c[v] = load(in.C + v * kLanes);
  for (int64_t r = 0; r < rows; ++r) {
    const F dx = splat(in.dx[r]);
    F sum = {};
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const int lanes = v == vectors - 1 ? states.last : kLanes;
      const F h = fma(dx, b[v], decay * (states.from ? load(states.from + v * kLanes, lanes) : F{}));
      store(states.to + v * kLanes, h, lanes);
      sum = v ? fma(h, c[v], sum) : more ? fma(h, c[v], sums[r]) : h * c[v];
    }
    sums[r] = sum;
    states.to += states.stride;
    if (states.from) states.from += states.stride;
  }
}

// `rows` rows, at most kLanes, by `vectors` vectors.
template <int vectors, bool more>
HCMEN_INLINE void dual_tiles(int64_t rows, int64_t steps, DualInputs in, DualRows states, F* sums) {
  constexpr int kRows = dual_rows(vectors);
  const auto advance = [&](int count) {
    in.dx += count, sums += count, states.to += count * states.stride;
    if (states.from) states.from += count * states.stride;
  };
  if (steps == 1) return dual_step<vectors, more>(rows, in, states, sums);
  for (; rows >= kRows; rows -= kRows, advance(kRows)) dual_tile<kRows, vectors, more>(steps, in, states, sums);
  for (; rows > 0; --rows, advance(1)) dual_tile<1, vectors, more>(steps, in, states, sums);
}

template <bool more>
HCMEN_INLINE void dual_tiles_of(int vectors, int64_t rows, int64_t steps, const DualInputs& in, const DualRows& states,
                                F* sums) {
  switch (vectors) {
    case 1: dual_tiles<1, more>(rows, steps, in, states, sums); break;
    case 2: dual_tiles<2, more>(rows, steps, in, states, sums); break;
    case 3: dual_tiles<3, more>(rows, steps, in, states, sums); break;
    case 4: dual_tiles<4, more>(rows, steps, in, states, sums); break;
    case 5: dual_tiles<5, more>(rows, steps, in, states, sums); break;
    case 6: dual_tiles<6, more>(rows, steps, in, states, sums); break;
    case 7: dual_tiles<7, more>(rows, steps, in, states, sums); break;
    case 8: dual_tiles<8, more>(rows, steps, in, states, sums); break;
  }
}

// Rows of an array [batch, time, ...], `width` elements a step, in scanning order from step `start` on.
template <class T>
struct DualSeries {
  T* first;
  int64_t stride;
};
template <class T>
HCMEN_INLINE DualSeries<T> dual_series(T* array, const hcmen_dual& s, int64_t batch, int64_t start, int64_t width,
                                       int64_t offset) {
  if (!array) return DualSeries<T>{nullptr, 0};
  const int64_t t = s.reverse ? s.time - 1 - start : start;
  return DualSeries<T>{array + (batch * s.time + t) * width + offset, s.reverse ? -width : width};
}

// B or C of some steps, float32 and whole vectors of them: the array itself, or a copy.
struct DualProjection {
  const float* row;
  int64_t stride;
};
template <class T>
HCMEN_INLINE DualProjection dual_project(DualSeries<const T> rows, int64_t steps, int64_t jump, int64_t states,
                                         float* copy) {
  const int64_t stride = vectors_of(states) * kLanes;
  // Rows far apart would push each other out of the first-level cache.
  if (sizeof(T) == sizeof(float) && states == stride && (steps == 1 || rows.stride == stride || rows.stride == -stride)) {
    return {(const float*)rows.first, rows.stride};
  }
  for (int64_t k = 0; k < steps; ++k) {
    for (int64_t n = 0; n < states; n += kLanes) {
      prefetch(rows.first + (k + jump) * rows.stride + n);
      store(copy + k * stride + n, load(rows.first + k * rows.stride + n, lanes_at(n, states)));
    }
  }
  return {copy, stride};
}

template <class T>
static int dual_forward_of(const hcmen_dual& s, const DualPart& part) {
  const int64_t width = s.head * s.head_dim, per_head = s.head_dim * s.state, vectors = vectors_of(s.state);
  const int64_t steps_most = s.time < kDualSteps ? s.time : kDualSteps;
  const int64_t row_room = vectors_of(part.rows) * kLanes;
  const int64_t most = kDualTogether / (part.rows * s.state * (int64_t)sizeof(float));
  const int64_t heads_at_once = most < 1 ? 1 : most < part.heads ? most : part.heads;
  const int64_t kept = s.last_state ? 0 : part.rows * s.state;  // states of a head that the caller does not want
  Scratch scratch(steps_most * kLanes, steps_most * (2 * vectors * kLanes + row_room + 2 * heads_at_once) +
                                           (steps_most < s.time ? heads_at_once : 1) * kept);
  if (!scratch.works()) return HCMEN_NO_MEMORY;
  F* const sums = scratch.vectors(steps_most * kLanes);
  float* const B_copy = scratch.floats(steps_most * vectors * kLanes);
  float* const C_copy = scratch.floats(steps_most * vectors * kLanes);
  float* const dx = scratch.floats(steps_most * row_room);
  float* const sizes = scratch.floats(steps_most * heads_at_once);
  float* const decays = scratch.floats(steps_most * heads_at_once);
  float* const own_states = scratch.floats((steps_most < s.time ? heads_at_once : 1) * kept);
  for (int64_t first = part.head; first < part.head + part.heads; first += heads_at_once) {
    const int64_t left = part.head + part.heads - first, heads = left < heads_at_once ? left : heads_at_once;
    for (int64_t start = 0; start < s.time; start += kDualSteps) {
      const int64_t steps = s.time - start < kDualSteps ? s.time - start : kDualSteps;
      dual_sizes<T>(s, part.batch, first, heads, start, steps, sizes, decays);
      DualProjection B = {}, C = {};
      for (int64_t head = first; head < first + heads; ++head) {
        const float *const d = sizes + (head - first) * steps, *const decay = decays + (head - first) * steps;
        const int64_t group = head / (s.head / s.group), offset = head * s.head_dim + part.row;
        const int64_t states = (part.batch * s.head + head) * per_head + part.row * s.state;
        const auto x = dual_series((const T*)s.x, s, part.batch, start, width, offset);
        const auto z = dual_series((const T*)s.z, s, part.batch, start, width, offset);
        const auto y = dual_series((T*)s.y, s, part.batch, start, width, offset);
        if (head == first || head % (s.head / s.group) == 0) {
          const int64_t jump = start + 2 * kDualSteps <= s.time ? kDualSteps : 0;
          const auto project = [&](const void* array, float* copy) {
            const auto rows = dual_series((const T*)array, s, part.batch, start, s.group * s.state, group * s.state);
            return dual_project<T>(rows, steps, jump, s.state, copy);
          };
          B = project(s.B, B_copy), C = project(s.C, C_copy);
        }
        // The next head, or the first one's next round, some lines at a time: steps lie too far apart for the hardware
        // to see the pattern.
        const bool last = head + 1 == first + heads;
        const int64_t next = last ? start + 2 * kDualSteps <= s.time ? kDualSteps : 0 : 0;
        const int64_t beside = last ? (first - head) * s.head_dim : s.head_dim;
        const auto ahead = [&](auto rows, int64_t k, int64_t p) {
          prefetch(rows.first + (k + next) * rows.stride + beside + p);
        };
        for (int64_t k = 0; k < steps; ++k) {
          for (int64_t p = 0; p < part.rows; p += kLanes) {
            store(dx + k * row_room + p, splat(d[k]) * load(x.first + k * x.stride + p, lanes_at(p, part.rows)));
          }
        }
        float* const own = own_states + (steps_most < s.time ? (head - first) * kept : 0);
        float* const to = s.last_state ? s.last_state + states : own;
        const float* const from = start ? to : s.initial_state ? s.initial_state + states : nullptr;
        for (int64_t p = 0; p < part.rows; p += kLanes) {
          const int lanes = lanes_at(p, part.rows);
          for (int64_t v = 0; v < vectors;) {
            const int64_t tiles = (vectors - v + kDualVectors - 1) / kDualVectors;
            const int size = (int)((vectors - v + tiles - 1) / tiles);
            const int64_t n = v * kLanes;
            const DualInputs in = {decay, B.row + n, C.row + n, dx + p, B.stride, row_room};
            const DualRows rows = {from ? from + p * s.state + n : nullptr, to + p * s.state + n, s.state,
                                   lanes_at(n + (size - 1) * kLanes, s.state)};
            if (v) {
              dual_tiles_of<true>(size, lanes, steps, in, rows, sums);
            } else {
              dual_tiles_of<false>(size, lanes, steps, in, rows, sums);
            }
            v += size;
          }
          for (int64_t k = 0; lanes < kLanes && k < steps; ++k) {
            for (int r = lanes; r < kLanes; ++r) sums[k * kLanes + r] = F{};
          }
          const F skip = s.wide_D ? load(s.D + offset + p, lanes) : splat(s.D[head]);
          for (int64_t k = 0; k < steps; ++k) {
            F row[kLanes];
#pragma GCC unroll 16
            for (int r = 0; r < kLanes; ++r) row[r] = sums[k * kLanes + r];
            F out = fma(skip, load(x.first + k * x.stride + p, lanes), sums_of_lanes(row));
            if (s.z) out *= silu(load(z.first + k * z.stride + p, lanes));
            store(y.first + k * y.stride + p, out, lanes);
            ahead(x, k, p);
            ahead(y, k, p);
            if (s.z) ahead(z, k, p);
          }
        }
      }
    }
  }
  return HCMEN_OK;
}

static int dual_forward(const hcmen_dual& s, const DualPart& part) {
  return s.dtype == HCMEN_FLOAT16 ? dual_forward_of<Half>(s, part) : dual_forward_of<float>(s, part);
}

}  // namespace HCMEN_ISA_NAMESPACE
}  // namespace hcmen

#endif  // HCMEN_STATE_SPACE_DUAL_INL_H_
