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
constexpr int kChunk = kLanes >= 16 ? 32 : 64;

// State indices of a tile: their states, and where registers abound their decay rates, live in registers. (AVX2 has
// them in memory beyond the fourth, which still beats twice as many rounds.)
#if defined(__AVX2__) || defined(__AVX512F__)
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
    for (int64_t n = 0; n < states; n += kLanes) {
      const int columns = states - n < kLanes ? (int)(states - n) : kLanes;
      F square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        square[i] = i < lanes ? load(from + (v * kLanes + i) * states + n, columns) * factor : F{};
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i < columns) to[v * states + n + i] = square[i];
      }
    }
  }
}

HCMEN_INLINE void store_columns(const F* from, int64_t count, int64_t states, float* to) {
  const int vectors = (int)((count + kLanes - 1) / kLanes);
  for (int v = 0; v < vectors; ++v) {
    const int lanes = lanes_of(count, v);
    for (int64_t n = 0; n < states; n += kLanes) {
      const int columns = states - n < kLanes ? (int)(states - n) : kLanes;
      F square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = i < columns ? from[v * states + n + i] : F{};
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i < lanes) store(to + (v * kLanes + i) * states + n, square[i], columns);
      }
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

// Memory that is needed soon, asked for a row at a time while the processor computes: two arrays, `stride` bytes between
// their rows. A chunk's worth of requests at once would have to wait for each other (0.98 ms instead of 0.91 ms for 512
// channels over 500 steps, whose arrays lie in the third-level cache), and rows lie too far apart for the hardware to
// see the pattern.
struct Ahead {
  const char* one;
  const char* other;
  int64_t stride;
};

// One chunk for one vector of channels and `size` states: y[k] += sum over the tile of C * h.
template <int size, bool safe>
HCMEN_APART void scan_tile(int64_t steps, const F* a, F* state, const F* d, const F* du, F* y, Projection B, Projection C,
                           Ahead ahead) {
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
    prefetch(ahead.one);
    prefetch(ahead.other);
    ahead.one += ahead.stride;
    ahead.other += ahead.stride;
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

// Tiles take turns with `first` and `second`.
template <bool safe>
HCMEN_INLINE void scan_states(int64_t states, int64_t steps, const F* a, F* state, const F* d, const F* du, F* y,
                              Projection B, Projection C, Ahead first, Ahead second) {
  Ahead ahead = first, next = second;
  for (int64_t n = 0; n < states;) {
    const int size = tile_size(states - n);
    const Projection b = {B.row + n, B.stride}, c = {C.row + n, C.stride};
    switch (size) {
      case 1: scan_tile<1, safe>(steps, a + n, state + n, d, du, y, b, c, ahead); break;
      case 2: scan_tile<2, safe>(steps, a + n, state + n, d, du, y, b, c, ahead); break;
      case 3: scan_tile<3, safe>(steps, a + n, state + n, d, du, y, b, c, ahead); break;
      case 4: scan_tile<4, safe>(steps, a + n, state + n, d, du, y, b, c, ahead); break;
#if defined(__AVX2__) || defined(__AVX512F__)
      case 5: scan_tile<5, safe>(steps, a + n, state + n, d, du, y, b, c, ahead); break;
      case 6: scan_tile<6, safe>(steps, a + n, state + n, d, du, y, b, c, ahead); break;
      case 7: scan_tile<7, safe>(steps, a + n, state + n, d, du, y, b, c, ahead); break;
      case 8: scan_tile<8, safe>(steps, a + n, state + n, d, du, y, b, c, ahead); break;
#endif
    }
    const Ahead done = ahead;
    ahead = next, next = done;
    n += size;
  }
}

// One chunk of one vector of channels on its way: d[k] is the step size, du[k] that times u, y[k] the output.
struct Chunk {
  F d[kChunk];
  F padding[kPadding];
  F du[kChunk];
  F more_padding[kPadding];
  F y[kChunk];
};

// What stands before the recurrence. Returns the largest |d|, per lane, as magnitude bits. `count` is `kLanes` known at
// compile time, or the lanes that there are.
template <class T, bool with_softplus>
HCMEN_INLINE I open_chunk(int64_t steps, Rows<const T> u, Rows<const T> delta, int count, F skip, F bias, Chunk* chunk) {
  I largest = {};
  for (int64_t k = 0; k < steps; ++k) {
    const F uk = load(u.first + k * u.stride, count);
    F dk = load(delta.first + k * delta.stride, count) + bias;
    if (with_softplus) dk = softplus(dk);
    largest = magnitude_max(largest, dk);
    chunk->d[k] = dk;
    chunk->du[k] = dk * uk;
    chunk->y[k] = skip * uk;
  }
  return largest;
}

// What comes after it.
template <class T>
HCMEN_INLINE void close_chunk(int64_t steps, const Chunk* chunk, Rows<const T> z, int count, Rows<T> y) {
  if (!z.first) {
    for (int64_t k = 0; k < steps; ++k) store(y.first + k * y.stride, chunk->y[k], count);
    return;
  }
  for (int64_t k = 0; k < steps; ++k) {
    const F gate = silu(load(z.first + k * z.stride, count));
    store(y.first + k * y.stride, chunk->y[k] * gate, count);
  }
}

// Working memory of a block: decay rates and states, [vector][state], and where B and C are widened, [step][state].
struct Room {
  F* a;
  F* h;
  float* B;
  float* C;
  int64_t steps;  // of a chunk, at most kChunk
};

template <class T, bool with_softplus>
static void scan_forward_typed(const hcmen_scan& s, const ChannelBlock& block, const TimeSpan& span, Room room) {
  const int vectors = (int)((block.count + kLanes - 1) / kLanes);
  const int64_t states = s.state, projection = s.group * states;
  F *const a = room.a, *const h = room.h;

  load_columns(s.A + block.channel * states, block.count, states, kLog2e, a);
  if (span.initial_state) {
    load_columns(span.initial_state, block.count, states, 1.0f, h);
  } else {
    for (int64_t i = 0; i < vectors * states; ++i) h[i] = F{};
  }

  F skip[kBlockVectors], bias[kBlockVectors], rate[kBlockVectors];
  for (int v = 0; v < vectors; ++v) {
    const int lanes = lanes_of(block.count, v);
    skip[v] = load(s.D + block.channel + v * kLanes, lanes);
    bias[v] = load(s.delta_bias + block.channel + v * kLanes, lanes);
    rate[v] = largest_rate(a + v * states, states);
  }

  const auto u = rows_of<const T>(s.u, s, block.batch, s.channel, block.channel);
  const auto delta = rows_of<const T>(s.delta, s, block.batch, s.channel, block.channel);
  const auto z = rows_of<const T>(s.z, s, block.batch, s.channel, block.channel);
  const auto y = rows_of<T>(s.y, s, block.batch, s.channel, block.channel);
  const auto B_rows = rows_of<const T>(s.B, s, block.batch, projection, block.group * states);
  const auto C_rows = rows_of<const T>(s.C, s, block.batch, projection, block.group * states);

  Chunk chunk;
  const int64_t end = span.start + span.count;
  for (int64_t start = span.start; start < end; start += room.steps) {
    const int64_t steps = end - start < room.steps ? end - start : room.steps;
    const Projection B = project(B_rows, start, steps, states, room.B);
    const Projection C = project(C_rows, start, steps, states, room.C);
    for (int v = 0; v < vectors; ++v) {
      const int lanes = lanes_of(block.count, v);
      const auto here = [&](auto rows) {
        if (rows.first) rows.first += start * rows.stride + v * kLanes;
        return rows;
      };
      const I largest =
          lanes == kLanes
              ? open_chunk<T, with_softplus>(steps, here(u), here(delta), kLanes, skip[v], bias[v], &chunk)
              : open_chunk<T, with_softplus>(steps, here(u), here(delta), lanes, skip[v], bias[v], &chunk);
      // The next chunk; at the end, what is there already.
      const int64_t jump = start + steps < end ? room.steps : 0;
      const auto there = [&](auto rows) { return (const char*)(here(rows).first + jump * rows.stride); };
      const int64_t stride = u.stride * (int64_t)sizeof(T);
      const Ahead inputs = {there(u), there(delta), stride}, others = {there(s.z ? z : u), there(y), stride};
      F *av = a + v * states, *hv = h + v * states;
      if (all_products_below((F)largest, rate[v], kFastExponent)) {
        scan_states<false>(states, steps, av, hv, chunk.d, chunk.du, chunk.y, B, C, inputs, others);
      } else {
        scan_states<true>(states, steps, av, hv, chunk.d, chunk.du, chunk.y, B, C, inputs, others);
      }
      if (lanes == kLanes) {
        close_chunk<T>(steps, &chunk, here(z), kLanes, here(y));
      } else {
        close_chunk<T>(steps, &chunk, here(z), lanes, here(y));
      }
    }
  }
  if (span.last_state) store_columns(h, block.count, states, span.last_state);
}

template <class T>
static void scan_forward_in(const hcmen_scan& s, const ChannelBlock& block, const TimeSpan& span, Room room) {
  if (s.delta_softplus) {
    scan_forward_typed<T, true>(s, block, span, room);
  } else {
    scan_forward_typed<T, false>(s, block, span, room);
  }
}

// Vectors of decay rates, and of states, that a block may have on the stack.
constexpr int64_t kRoom = 256;

template <class T>
static int scan_forward_of(const hcmen_scan& s, const ChannelBlock& block, const TimeSpan& span) {
  constexpr bool widened = sizeof(T) != sizeof(float);
  if (s.state > kRoom) {
    // More states than any known model has.
    const int64_t vectors = (block.count + kLanes - 1) / kLanes * s.state, copies = widened ? kChunk * s.state : 0;
    Scratch scratch(2 * vectors, 2 * copies);
    if (!scratch.works()) return HCMEN_NO_MEMORY;
    F *a = scratch.vectors(vectors), *h = scratch.vectors(vectors);
    float *B = scratch.floats(copies), *C = scratch.floats(copies);
    scan_forward_in<T>(s, block, span, {a, h, B, C, kChunk});
    return HCMEN_OK;
  }
  // All on the stack: a scan allocates nothing. Parts and chunks are made to fit, on which no result depends.
  constexpr int64_t kCopies = widened ? 2048 : 1;
  F a[kRoom], h[kRoom];
  float B[kCopies], C[kCopies];
  const int64_t channels = kRoom / s.state * kLanes;
  const int64_t steps = widened && kCopies / s.state < kChunk ? kCopies / s.state : kChunk;
  for (int64_t done = 0; done < block.count; done += channels) {
    const int64_t count = block.count - done < channels ? block.count - done : channels;
    const auto beyond = [&](auto* states) { return states ? states + done * s.state : nullptr; };
    scan_forward_in<T>(s, {block.batch, block.group, block.channel + done, count},
                       {span.start, span.count, beyond(span.initial_state), beyond(span.last_state)},
                       {a, h, B, C, steps});
  }
  return HCMEN_OK;
}

static int scan_forward(const hcmen_scan& s, const ChannelBlock& block, const TimeSpan& span) {
  return s.dtype == HCMEN_FLOAT16 ? scan_forward_of<Half>(s, block, span) : scan_forward_of<float>(s, block, span);
}

}  // namespace HCMEN_ISA_NAMESPACE
}  // namespace hcmen

#endif  // HCMEN_SELECTIVE_SCAN_INL_H_
