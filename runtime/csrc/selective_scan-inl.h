// The selective scan, vectorised over channels: lane i of a vector is channel i of a block, and the states of a tile
// of state indices stay in registers while a chunk of time goes by. See vector-inl.h for the rules of these files.
#ifndef HCMEN_SELECTIVE_SCAN_INL_H_
#define HCMEN_SELECTIVE_SCAN_INL_H_

#include "kernel_table.h"
#include "vector-inl.h"

namespace hcmen {
namespace HCMEN_ISA_NAMESPACE {

// Steps of one chunk: softplus and the gate are computed once per chunk into buffers that stay in the first-level cache
// while every tile of states passes over them.
constexpr int kChunk = 32;

// State indices of a tile: their states, and where registers abound their decay rates, live in registers.
#if defined(__AVX512F__)
constexpr int kTile = 8;
#else
constexpr int kTile = 4;
#endif

// Vectors left free between buffers that would else lie a multiple of 4096 bytes apart: stores to one would hold up
// loads from the other.
constexpr int kPadding = 1;

constexpr int kBlockVectors = (int)(kBlockChannels / kLanes);

// The next tile of `left` states: as even as can be, so that 17 goes 6, 6, 5 and not 8, 8, 1.
HCMEN_INLINE int tile_size(int64_t left) {
  const int64_t tiles = (left + kTile - 1) / kTile;
  return (int)((left + tiles - 1) / tiles);
}

// One dense array [batch, time, channel] seen from a block: rows by scanning order, whichever way that runs.
template <class T>
struct Rows {
  T* first;
  int64_t stride;
};

template <class T, class Pointer>
HCMEN_INLINE Rows<T> rows_of(Pointer* array, const hcmen_scan& s, int64_t batch, int64_t width, int64_t offset) {
  if (!array) return Rows<T>{nullptr, 0};
  const int64_t start = s.reverse ? s.time - 1 : 0;
  return Rows<T>{(T*)array + (batch * s.time + start) * width + offset, s.reverse ? -width : width};
}

// The block's part of a row that comes up one chunk later: rows lie too far apart for the hardware to see the pattern.
template <class T>
HCMEN_INLINE void prefetch_row(Rows<T> rows, int64_t step, int64_t time, int64_t count) {
  if (!rows.first || step >= time) return;
  const char* row = (const char*)(rows.first + step * rows.stride);
  for (int64_t byte = 0; byte < count * (int64_t)sizeof(T); byte += 64) prefetch(row + byte);
}

HCMEN_INLINE int lanes_of(int64_t count, int v) {
  const int64_t left = count - (int64_t)v * kLanes;
  return left < kLanes ? (int)left : kLanes;
}

// [channel, state] from a channel on -> vectors [v][state], times `factor`; lanes beyond the block are zero.
HCMEN_INLINE void load_columns(const float* from, int64_t count, int64_t states, float factor, F* to) {
  const int vectors = (int)((count + kLanes - 1) / kLanes);
  for (int v = 0; v < vectors; ++v) {
    const int lanes = lanes_of(count, v);
    for (int64_t n = 0; n < states; ++n) {
      float x[kLanes] = {};
      for (int i = 0; i < lanes; ++i) x[i] = from[(v * kLanes + i) * states + n];
      to[v * states + n] = load(x) * factor;
    }
  }
}

HCMEN_INLINE void store_columns(const F* from, int64_t count, int64_t states, float* to) {
  const int vectors = (int)((count + kLanes - 1) / kLanes);
  for (int v = 0; v < vectors; ++v) {
    const int lanes = lanes_of(count, v);
    for (int64_t n = 0; n < states; ++n) {
      float x[kLanes];
      store(x, from[v * states + n]);
      for (int i = 0; i < lanes; ++i) to[(v * kLanes + i) * states + n] = x[i];
    }
  }
}

// The largest |a| over the states, per lane, as magnitude bits.
HCMEN_INLINE F largest_rate(const F* a, int64_t states) {
  I largest = {};
  for (int64_t n = 0; n < states; ++n) largest = magnitude_max(largest, a[n]);
  return (F)largest;
}

// Rows of B or C for a chunk as float32: the array itself, or a widened copy.
struct Projection {
  const float* row;
  int64_t stride;
};

HCMEN_INLINE Projection project(Rows<const float> rows, int64_t step, int64_t, int64_t, float*) {
  return Projection{rows.first + step * rows.stride, rows.stride};
}

HCMEN_INLINE Projection project(Rows<const Half> rows, int64_t step, int64_t steps, int64_t states, float* copy) {
  for (int64_t k = 0; k < steps; ++k) widen_array(rows.first + (step + k) * rows.stride, copy + k * states, states);
  return Projection{copy, states};
}

// --- forward --------------------------------------------------------------------------------------------------------

// One chunk for one vector of channels and `size` states: y[k] += sum over the tile of C * h.
template <int size, bool safe>
HCMEN_APART void scan_tile(int64_t steps, const F* a, F* state, const F* d, const F* du, F* y, Projection B, Projection C) {
  F h[size], rate[size];
#pragma GCC unroll 8
  for (int s = 0; s < size; ++s) {
    h[s] = state[s];
    rate[s] = a[s];
  }
  const float* b = B.row;
  const float* c = C.row;
  for (int64_t k = 0; k < steps; ++k, b += B.stride, c += C.stride) {
    const F dk = d[k], duk = du[k];
    F even = y[k], odd = {};
#pragma GCC unroll 8
    for (int s = 0; s < size; ++s) {
      const F decay = exp2_product<safe>(dk, rate[s]);
      h[s] = fma(decay, h[s], duk * splat(b[s]));
      if (s % 2) {
        odd = fma(h[s], splat(c[s]), odd);
      } else {
        even = fma(h[s], splat(c[s]), even);
      }
    }
    y[k] = size > 1 ? even + odd : even;
  }
#pragma GCC unroll 8
  for (int s = 0; s < size; ++s) state[s] = h[s];
}

template <bool safe>
HCMEN_INLINE void scan_states(int64_t states, int64_t steps, const F* a, F* state, const F* d, const F* du, F* y,
                              Projection B, Projection C) {
  for (int64_t n = 0; n < states;) {
    const int size = tile_size(states - n);
    const Projection b = {B.row + n, B.stride}, c = {C.row + n, C.stride};
    switch (size) {
      case 1: scan_tile<1, safe>(steps, a + n, state + n, d, du, y, b, c); break;
      case 2: scan_tile<2, safe>(steps, a + n, state + n, d, du, y, b, c); break;
      case 3: scan_tile<3, safe>(steps, a + n, state + n, d, du, y, b, c); break;
      case 4: scan_tile<4, safe>(steps, a + n, state + n, d, du, y, b, c); break;
#if defined(__AVX512F__)
      case 5: scan_tile<5, safe>(steps, a + n, state + n, d, du, y, b, c); break;
      case 6: scan_tile<6, safe>(steps, a + n, state + n, d, du, y, b, c); break;
      case 7: scan_tile<7, safe>(steps, a + n, state + n, d, du, y, b, c); break;
      case 8: scan_tile<8, safe>(steps, a + n, state + n, d, du, y, b, c); break;
#endif
    }
    n += size;
  }
}

template <class T, bool with_softplus>
static int scan_forward_typed(const hcmen_scan& s, const ChannelBlock& block) {
  const int vectors = (int)((block.count + kLanes - 1) / kLanes);
  const int64_t states = s.state, projection = s.group * states;
  const int64_t chunk = s.time < kChunk ? s.time : kChunk;
  const bool widened = sizeof(T) != sizeof(float);

  const int64_t room = chunk + kPadding, per_vector = vectors * states, per_chunk = vectors * room;
  Scratch scratch(2 * per_vector + 3 * per_chunk, widened ? 2 * chunk * states : 0);
  if (!scratch.works()) return HCMEN_NO_MEMORY;
  F* a = scratch.vectors(per_vector);
  F* h = scratch.vectors(per_vector);
  F* d = scratch.vectors(per_chunk);
  F* du = scratch.vectors(per_chunk);
  F* y = scratch.vectors(per_chunk);
  float* b_copy = scratch.floats(widened ? chunk * states : 0);
  float* c_copy = scratch.floats(widened ? chunk * states : 0);

  load_columns(s.A + block.channel * states, block.count, states, kLog2e, a);
  const int64_t state_offset = (block.batch * s.channel + block.channel) * states;
  if (s.initial_state) {
    load_columns(s.initial_state + state_offset, block.count, states, 1.0f, h);
  } else {
    for (int64_t i = 0; i < per_vector; ++i) h[i] = F{};
  }

  F skip[kBlockVectors], bias[kBlockVectors], rate[kBlockVectors];
  for (int v = 0; v < vectors; ++v) {
    const int lanes = lanes_of(block.count, v);
    skip[v] = load(s.D + block.channel + v * kLanes, lanes);
    bias[v] = load(s.delta_bias + block.channel + v * kLanes, lanes);
    rate[v] = largest_rate(a + v * states, states);
  }

  const auto u_rows = rows_of<const T>(s.u, s, block.batch, s.channel, block.channel);
  const auto delta_rows = rows_of<const T>(s.delta, s, block.batch, s.channel, block.channel);
  const auto z_rows = rows_of<const T>(s.z, s, block.batch, s.channel, block.channel);
  const auto y_rows = rows_of<T>(s.y, s, block.batch, s.channel, block.channel);
  const auto B_rows = rows_of<const T>(s.B, s, block.batch, projection, block.group * states);
  const auto C_rows = rows_of<const T>(s.C, s, block.batch, projection, block.group * states);

  for (int64_t start = 0; start < s.time; start += chunk) {
    const int64_t steps = s.time - start < chunk ? s.time - start : chunk;
    I largest[kBlockVectors] = {};
    for (int64_t k = 0; k < steps; ++k) {
      const T* u_row = u_rows.first + (start + k) * u_rows.stride;
      const T* delta_row = delta_rows.first + (start + k) * delta_rows.stride;
      prefetch_row(u_rows, start + k + chunk, s.time, block.count);
      prefetch_row(delta_rows, start + k + chunk, s.time, block.count);
      prefetch_row(z_rows, start + k, s.time, block.count);
      prefetch_row(y_rows, start + k, s.time, block.count);
      for (int v = 0; v < vectors; ++v) {
        const int lanes = lanes_of(block.count, v);
        const F uk = load(u_row + v * kLanes, lanes);
        F dk = load(delta_row + v * kLanes, lanes) + bias[v];
        if (with_softplus) dk = softplus(dk);
        largest[v] = magnitude_max(largest[v], dk);
        d[v * room + k] = dk;
        du[v * room + k] = dk * uk;
        y[v * room + k] = skip[v] * uk;
      }
    }
    const Projection B = project(B_rows, start, steps, states, b_copy);
    const Projection C = project(C_rows, start, steps, states, c_copy);
    for (int v = 0; v < vectors; ++v) {
      F *av = a + v * states, *hv = h + v * states, *dv = d + v * room, *duv = du + v * room, *yv = y + v * room;
      if (all_products_below((F)largest[v], rate[v], kFastExponent)) {
        scan_states<false>(states, steps, av, hv, dv, duv, yv, B, C);
      } else {
        scan_states<true>(states, steps, av, hv, dv, duv, yv, B, C);
      }
    }
    for (int64_t k = 0; k < steps; ++k) {
      T* y_row = y_rows.first + (start + k) * y_rows.stride;
      const T* z_row = z_rows.first + (start + k) * z_rows.stride;
      for (int v = 0; v < vectors; ++v) {
        const int lanes = lanes_of(block.count, v);
        F yk = y[v * room + k];
        if (s.z) yk *= silu(load(z_row + v * kLanes, lanes));
        store(y_row + v * kLanes, yk, lanes);
      }
    }
  }
  if (s.last_state) store_columns(h, block.count, states, s.last_state + state_offset);
  return HCMEN_OK;
}

static int scan_forward(const hcmen_scan& s, const ChannelBlock& block) {
  if (s.dtype == HCMEN_FLOAT16) {
    return s.delta_softplus ? scan_forward_typed<Half, true>(s, block) : scan_forward_typed<Half, false>(s, block);
  }
  return s.delta_softplus ? scan_forward_typed<float, true>(s, block) : scan_forward_typed<float, false>(s, block);
}

}  // namespace HCMEN_ISA_NAMESPACE
}  // namespace hcmen

#endif  // HCMEN_SELECTIVE_SCAN_INL_H_
