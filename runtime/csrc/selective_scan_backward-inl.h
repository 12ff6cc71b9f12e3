// Gradients of the selective scan, vectorised over channels like the forward pass. See vector-inl.h for the rules.
//
// With g[t] the gradient of the state after step t, and s[t] that of y before the gate,
//
//   g[t]        = C[t] s[t] + decay[t+1] g[t+1]                  g after the last step: dlast_state
//   dC[t]       = sum over channels of s[t] h[t]
//   dB[t]       = sum over channels of g[t] d[t] u[t]
//   dA          = sum over time of d[t] decay[t] h[t-1] g[t]
//   gradient of d[t] = sum over states of g[t] (A decay[t] h[t-1] + B[t] u[t])
//   du[t]       = D s[t] + d[t] sum over states of g[t] B[t]
//
// States are not kept for all of time: one sweep forward keeps those at the start of every chunk, then the chunks are
// taken from the last to the first, each recomputed from its start.
#ifndef HCMEN_SELECTIVE_SCAN_BACKWARD_INL_H_
#define HCMEN_SELECTIVE_SCAN_BACKWARD_INL_H_

#include "selective_scan-inl.h"

namespace hcmen {
namespace HCMEN_ISA_NAMESPACE {

// Decays, states and sums of one chunk and tile: 4 * kBackwardChunk * kBackwardTile vectors, meant for the first-level
// cache.
constexpr int kBackwardChunk = kLanes >= 16 ? 16 : 32;
constexpr int kBackwardTile = 4;

constexpr float kLn2 = 0x1.62e430p-1f;

// Gradient rows of B or C: row k of a chunk in scanning order is `stride` elements from row k - 1.
struct ProjectionGrad {
  float* row;
  int64_t stride;
};

// The lane sums of [step][size] vectors into `size` elements of each row.
static void reduce_rows(const F* sums, int64_t steps, int size, ProjectionGrad to, bool accumulate) {
  const int64_t count = steps * size;
  int64_t k = 0;
  int s = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    F group[kLanes];
    const int filled = count - i < kLanes ? (int)(count - i) : kLanes;
    for (int j = 0; j < kLanes; ++j) group[j] = j < filled ? sums[i + j] : F{};
    float totals[kLanes];
    store(totals, sums_of_lanes(group));
    for (int j = 0; j < filled; ++j) {
      float* place = to.row + k * to.stride + s;
      *place = accumulate ? *place + totals[j] : totals[j];
      if (++s == size) s = 0, ++k;
    }
  }
}

// One chunk of the first sweep: the states alone.
template <int size, bool safe>
HCMEN_APART void advance_tile(int64_t steps, const F* a, F* state, const F* d, const F* du, Projection B) {
  F h[size], rate[size];
#pragma GCC unroll 8
  for (int s = 0; s < size; ++s) {
    h[s] = state[s];
    rate[s] = a[s];
  }
  const float* b = B.row;
  for (int64_t k = 0; k < steps; ++k, b += B.stride) {
    const F dk = d[k], duk = du[k];
#pragma GCC unroll 8
    for (int s = 0; s < size; ++s) h[s] = fma(exp2_product<safe>(dk, rate[s]), h[s], duk * splat(b[s]));
  }
#pragma GCC unroll 8
  for (int s = 0; s < size; ++s) state[s] = h[s];
}

template <bool safe>
HCMEN_INLINE void advance_states(int64_t states, int64_t steps, const F* a, F* state, const F* d, const F* du,
                                 Projection B) {
  for (int64_t n = 0; n < states;) {
    const int size = tile_size(states - n);
    const Projection b = {B.row + n, B.stride};
    switch (size) {
      case 1: advance_tile<1, safe>(steps, a + n, state + n, d, du, b); break;
      case 2: advance_tile<2, safe>(steps, a + n, state + n, d, du, b); break;
      case 3: advance_tile<3, safe>(steps, a + n, state + n, d, du, b); break;
      case 4: advance_tile<4, safe>(steps, a + n, state + n, d, du, b); break;
#if defined(__AVX2__) || defined(__AVX512F__)
      case 5: advance_tile<5, safe>(steps, a + n, state + n, d, du, b); break;
      case 6: advance_tile<6, safe>(steps, a + n, state + n, d, du, b); break;
      case 7: advance_tile<7, safe>(steps, a + n, state + n, d, du, b); break;
      case 8: advance_tile<8, safe>(steps, a + n, state + n, d, du, b); break;
#endif
    }
    n += size;
  }
}

// What a chunk holds for one vector of channels, [step] each.
struct ChunkBuffers {
  const F* d;
  const F* du;  // d * u
  const F* dy;  // gradient of y before the gate
  F* y;         // y before the gate, summed up tile by tile
  F* through_B;      // sum over states of g B
  F* through_decay;  // sum over states of g A decay h[t-1], with A in powers of two
};

// One chunk, one vector of channels, one tile of states. `start` are the states before the chunk, `carry` is
// decay * g of the step after it in, of its own first step out. `decays` and `before` hold the chunk's decays and the
// state before each step (and after the last); `sum_B` and `sum_C` collect dB and dC over the vectors of the block.
template <int size, bool safe>
HCMEN_APART void backward_tile(int64_t steps, const F* a, const F* start, F* carry, F* dA, const ChunkBuffers& chunk,
                          Projection B, Projection C, F* decays, F* before, F* sum_B, F* sum_C) {
  F rate[size];
  {
    F h[size];
#pragma GCC unroll 4
    for (int s = 0; s < size; ++s) {
      h[s] = before[s] = start[s];
      rate[s] = a[s];
    }
    const float* b = B.row;
    const float* c = C.row;
    for (int64_t k = 0; k < steps; ++k, b += B.stride, c += C.stride) {
      const F dk = chunk.d[k], duk = chunk.du[k];
      F y = chunk.y[k];
#pragma GCC unroll 4
      for (int s = 0; s < size; ++s) {
        const F decay = exp2_product<safe>(dk, rate[s]);
        h[s] = fma(decay, h[s], duk * splat(b[s]));
        decays[k * size + s] = decay;
        before[(k + 1) * size + s] = h[s];
        y = fma(h[s], splat(c[s]), y);
      }
      chunk.y[k] = y;
    }
  }
  F g[size], da[size];
#pragma GCC unroll 4
  for (int s = 0; s < size; ++s) {
    g[s] = carry[s];
    da[s] = F{};
  }
  for (int64_t k = steps - 1; k >= 0; --k) {
    const float* b = B.row + k * B.stride;
    const float* c = C.row + k * C.stride;
    const F dk = chunk.d[k], duk = chunk.du[k], dyk = chunk.dy[k];
    F through_B = chunk.through_B[k], through_decay = chunk.through_decay[k];
#pragma GCC unroll 4
    for (int s = 0; s < size; ++s) {
      const int64_t at = k * size + s;
      const F own = fma(dyk, splat(c[s]), g[s]);
      sum_C[at] = fma(dyk, before[at + size], sum_C[at]);
      sum_B[at] = fma(own, duk, sum_B[at]);
      through_B = fma(own, splat(b[s]), through_B);
      g[s] = own * decays[at];
      const F moved = g[s] * before[at];
      through_decay = fma(rate[s], moved, through_decay);
      da[s] = fma(dk, moved, da[s]);
    }
    chunk.through_B[k] = through_B;
    chunk.through_decay[k] = through_decay;
  }
#pragma GCC unroll 4
  for (int s = 0; s < size; ++s) {
    carry[s] = g[s];
    dA[s] += da[s];
  }
}

template <bool safe>
HCMEN_INLINE void backward_tile_of(int size, int64_t steps, const F* a, const F* start, F* carry, F* dA,
                                   const ChunkBuffers& chunk, Projection B, Projection C, F* decays, F* before,
                                   F* sum_B, F* sum_C) {
  switch (size) {
    case 1: backward_tile<1, safe>(steps, a, start, carry, dA, chunk, B, C, decays, before, sum_B, sum_C); break;
    case 2: backward_tile<2, safe>(steps, a, start, carry, dA, chunk, B, C, decays, before, sum_B, sum_C); break;
    case 3: backward_tile<3, safe>(steps, a, start, carry, dA, chunk, B, C, decays, before, sum_B, sum_C); break;
    case 4: backward_tile<4, safe>(steps, a, start, carry, dA, chunk, B, C, decays, before, sum_B, sum_C); break;
  }
}

static int scan_backward(const hcmen_scan& s, const hcmen_scan_grad& grad, const ScanGradTargets& targets,
                         const ChannelBlock& block) {
  const int vectors = (int)((block.count + kLanes - 1) / kLanes);
  const int64_t states = s.state, projection = s.group * states;
  const int64_t chunk = s.time < kBackwardChunk ? s.time : kBackwardChunk;
  const int64_t chunks = (s.time + chunk - 1) / chunk;
  const int64_t room = chunk + kPadding, per_vector = vectors * states, per_chunk = vectors * room;
  // Eight vectors apart, for the reason of kPadding; `before` has one step more.
  const int64_t per_tile = chunk * kBackwardTile + 8;

  constexpr int kSeries = 8;
  Scratch scratch((3 + chunks) * per_vector + kSeries * per_chunk + 4 * per_tile, 0);
  if (!scratch.works()) return HCMEN_NO_MEMORY;
  F* a = scratch.vectors(per_vector);
  F* carry = scratch.vectors(per_vector);  // the running states of the first sweep, then decay * g
  F* dA = scratch.vectors(per_vector);
  F* starts = scratch.vectors(chunks * per_vector);
  F* d = scratch.vectors(per_chunk);
  F* du = scratch.vectors(per_chunk);
  F* slope = scratch.vectors(per_chunk);  // of softplus
  F* dy = scratch.vectors(per_chunk);
  F* y = scratch.vectors(per_chunk);
  F* dz = scratch.vectors(per_chunk);  // the factor of y in dz
  F* through_B = scratch.vectors(per_chunk);
  F* through_decay = scratch.vectors(per_chunk);
  F* decays = scratch.vectors(per_tile);
  F* before = scratch.vectors(per_tile);
  F* sum_B = scratch.vectors(per_tile);
  F* sum_C = scratch.vectors(per_tile);

  load_columns(s.A + block.channel * states, block.count, states, kLog2e, a);
  const int64_t state_offset = (block.batch * s.channel + block.channel) * states;
  if (s.initial_state) {
    load_columns(s.initial_state + state_offset, block.count, states, 1.0f, carry);
  } else {
    for (int64_t i = 0; i < per_vector; ++i) carry[i] = F{};
  }
  F skip[kBlockVectors], bias[kBlockVectors], rate[kBlockVectors], dD[kBlockVectors], dbias[kBlockVectors];
  for (int v = 0; v < vectors; ++v) {
    const int lanes = lanes_of(block.count, v);
    skip[v] = load(s.D + block.channel + v * kLanes, lanes);
    bias[v] = load(s.delta_bias + block.channel + v * kLanes, lanes);
    rate[v] = largest_rate(a + v * states, states);
    dD[v] = dbias[v] = F{};
  }

  const auto u_rows = rows_of<const float>(s.u, s, block.batch, s.channel, block.channel);
  const auto delta_rows = rows_of<const float>(s.delta, s, block.batch, s.channel, block.channel);
  const auto z_rows = rows_of<const float>(s.z, s, block.batch, s.channel, block.channel);
  const auto B_rows = rows_of<const float>(s.B, s, block.batch, projection, block.group * states);
  const auto C_rows = rows_of<const float>(s.C, s, block.batch, projection, block.group * states);
  const auto dy_rows = rows_of<const float>(grad.dy, s, block.batch, s.channel, block.channel);
  const auto du_rows = rows_of<float>(grad.du, s, block.batch, s.channel, block.channel);
  const auto ddelta_rows = rows_of<float>(grad.ddelta, s, block.batch, s.channel, block.channel);
  const auto dz_rows = rows_of<float>(grad.dz, s, block.batch, s.channel, block.channel);
  const int64_t first_row = s.reverse ? s.time - 1 : 0, row_step = s.reverse ? -targets.row : targets.row;

  for (int64_t i = 0; i < chunks; ++i) {
    for (int64_t j = 0; j < per_vector; ++j) starts[i * per_vector + j] = carry[j];
    if (i == chunks - 1) break;
    const int64_t start = i * chunk;
    I largest[kBlockVectors] = {};
    for (int64_t k = 0; k < chunk; ++k) {
      const float* u_row = u_rows.first + (start + k) * u_rows.stride;
      const float* delta_row = delta_rows.first + (start + k) * delta_rows.stride;
      prefetch_row(u_rows, start + k + chunk, s.time, block.count);
      prefetch_row(delta_rows, start + k + chunk, s.time, block.count);
      for (int v = 0; v < vectors; ++v) {
        const int lanes = lanes_of(block.count, v);
        F dk = load(delta_row + v * kLanes, lanes) + bias[v];
        if (s.delta_softplus) dk = softplus(dk);
        largest[v] = magnitude_max(largest[v], dk);
        d[v * room + k] = dk;
        du[v * room + k] = dk * load(u_row + v * kLanes, lanes);
      }
    }
    const Projection B = project(B_rows, start, chunk, states, nullptr);
    for (int v = 0; v < vectors; ++v) {
      F *av = a + v * states, *hv = carry + v * states, *dv = d + v * room, *duv = du + v * room;
      if (all_products_below((F)largest[v], rate[v], kFastExponent)) {
        advance_states<false>(states, chunk, av, hv, dv, duv, B);
      } else {
        advance_states<true>(states, chunk, av, hv, dv, duv, B);
      }
    }
  }

  if (grad.dlast_state) {
    load_columns(grad.dlast_state + state_offset, block.count, states, 1.0f, carry);
  } else {
    for (int64_t i = 0; i < per_vector; ++i) carry[i] = F{};
  }
  for (int64_t i = 0; i < per_vector; ++i) dA[i] = F{};

  for (int64_t i = chunks - 1; i >= 0; --i) {
    const int64_t start = i * chunk;
    const int64_t steps = s.time - start < chunk ? s.time - start : chunk;
    I largest[kBlockVectors] = {};
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t step = start + k;
      if (step >= chunk) {
        prefetch_row(u_rows, step - chunk, s.time, block.count);
        prefetch_row(delta_rows, step - chunk, s.time, block.count);
        prefetch_row(dy_rows, step - chunk, s.time, block.count);
        prefetch_row(z_rows, step - chunk, s.time, block.count);
      }
      prefetch_row(du_rows, step, s.time, block.count);
      prefetch_row(ddelta_rows, step, s.time, block.count);
      prefetch_row(dz_rows, step, s.time, block.count);
      for (int v = 0; v < vectors; ++v) {
        const int lanes = lanes_of(block.count, v);
        const int64_t at = v * room + k, offset = v * kLanes;
        const F uk = load(u_rows.first + step * u_rows.stride + offset, lanes);
        F dk = load(delta_rows.first + step * delta_rows.stride + offset, lanes) + bias[v];
        slope[at] = splat(1.0f);
        if (s.delta_softplus) dk = softplus(dk, &slope[at]);
        largest[v] = magnitude_max(largest[v], dk);
        F dyk = load(dy_rows.first + step * dy_rows.stride + offset, lanes);
        if (s.z) {
          const F zk = load(z_rows.first + step * z_rows.stride + offset, lanes);
          const F gate = sigmoid(zk);
          dz[at] = dyk * gate * fma(zk, 1.0f - gate, splat(1.0f));
          dyk *= zk * gate;
        }
        d[at] = dk;
        du[at] = dk * uk;
        dy[at] = dyk;
        y[at] = skip[v] * uk;
        through_B[at] = through_decay[at] = F{};
      }
    }
    const Projection B = project(B_rows, start, steps, states, nullptr);
    const Projection C = project(C_rows, start, steps, states, nullptr);
    for (int64_t n = 0; n < states;) {
      const int64_t tiles = (states - n + kBackwardTile - 1) / kBackwardTile;
      const int size = (int)((states - n + tiles - 1) / tiles);
      for (int64_t j = 0; j < steps * size; ++j) sum_B[j] = sum_C[j] = F{};
      const Projection b = {B.row + n, B.stride}, c = {C.row + n, C.stride};
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = v * states + n, first = v * room;
        const ChunkBuffers buffers = {d + first, du + first, dy + first, y + first, through_B + first,
                                      through_decay + first};
        const F* from = starts + i * per_vector + at;
        if (all_products_below((F)largest[v], rate[v], kFastExponent)) {
          backward_tile_of<false>(size, steps, a + at, from, carry + at, dA + at, buffers, b, c, decays, before, sum_B,
                                  sum_C);
        } else {
          backward_tile_of<true>(size, steps, a + at, from, carry + at, dA + at, buffers, b, c, decays, before, sum_B,
                                 sum_C);
        }
      }
      const int64_t row = first_row * targets.row + start * row_step + n;
      reduce_rows(sum_B, steps, size, {targets.dB + row, row_step}, targets.accumulate);
      reduce_rows(sum_C, steps, size, {targets.dC + row, row_step}, targets.accumulate);
      n += size;
    }
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t step = start + k;
      for (int v = 0; v < vectors; ++v) {
        const int lanes = lanes_of(block.count, v);
        const int64_t at = v * room + k, offset = v * kLanes;
        const F uk = load(u_rows.first + step * u_rows.stride + offset, lanes);
        const F ddelta = fma(uk, through_B[at], through_decay[at] * kLn2) * slope[at];
        dbias[v] += ddelta;
        dD[v] = fma(dy[at], uk, dD[v]);
        store(ddelta_rows.first + step * ddelta_rows.stride + offset, ddelta, lanes);
        store(du_rows.first + step * du_rows.stride + offset, fma(d[at], through_B[at], skip[v] * dy[at]), lanes);
        if (s.z) store(dz_rows.first + step * dz_rows.stride + offset, dz[at] * y[at], lanes);
      }
    }
  }

  store_columns(dA, block.count, states, targets.dA + block.channel * states);
  for (int v = 0; v < vectors; ++v) {
    const int lanes = lanes_of(block.count, v);
    store(targets.dD + block.channel + v * kLanes, dD[v], lanes);
    store(targets.ddelta_bias + block.channel + v * kLanes, dbias[v], lanes);
  }
  if (grad.dinitial_state) store_columns(carry, block.count, states, grad.dinitial_state + state_offset);
  return HCMEN_OK;
}

}  // namespace HCMEN_ISA_NAMESPACE
}  // namespace hcmen

#endif  // HCMEN_SELECTIVE_SCAN_BACKWARD_INL_H_
