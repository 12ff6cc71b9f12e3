// The selective scan on a CUDA device. The arithmetic is in scan_step.h, how work is shared out in
// selective_scan_plan.cu; here it is done.
//
// A warp is cut in two directions: `lanes` lanes share the states of one channel, 32 / lanes channels lie side by side,
// so that neighbouring lanes read neighbouring channels. A lane keeps its states and their decay rates in registers.
//
// A warp takes its steps in rounds of kRound. The lanes of a channel divide a round's steps among them: each reads u,
// delta and z of its own steps, turns delta into a step size, tells the other lanes, and in the end adds up what all of
// them made of these steps, adds D u, applies the gate and writes y. So each element is read, and its softplus computed,
// once, and passes through no other memory. While a round is scanned, u and delta of the next one are on their way.
//
// B and C come through shared memory, since all warps of a block use the same ones. scan_forward_kernel has its warps
// side by side over channels; while a tile is scanned, B and C of the next are on their way into a second buffer.
// scan_split_kernel is for short sequences at small batches: its warps lie one after the other in time. Each finds what
// a round makes of a zero state; these chunks are put together (scan_step.h), so that each knows the states that its
// round starts from, and takes the round again, for the outputs.
//
// A long sequence at a small batch gives too few blocks. It is cut into chunks: a first launch finds what each chunk
// but the last makes of a zero state, a second one walks over these and leaves the states that each chunk starts from,
// a third one computes outputs, all chunks at once.
//
// What lies past an end (of time, channels, states) counts as zero: a step of size zero leaves every state as it was, a
// state with B = C = 0 stays zero. Lanes past the last channel work on the block's first one and write nothing.
#include "selective_scan_cuda.h"

namespace hcmen {
namespace cuda {
namespace {

enum Mode {
  kOutputs,  // y, and the last state
  kChunks,   // what a chunk makes of a zero state
};

// --- lanes ----------------------------------------------------------------------------------------------------------

// A lane's place in its warp. kLanes lanes share a channel, where 4 stands for four or more; then only the first four
// have steps of their own.
template <int kLanes>
struct Seat {
  static constexpr int kOwn = kLanes == 1 ? kRound : kLanes == 2 ? kRound / 2 : 1;  // steps of a round
  int shift;    // log2 of the channels of a warp
  int slice;    // which of its channel's lanes this one is
  int channel;  // which of the warp's channels

  __device__ __forceinline__ explicit Seat(const Layout& plan) {
    const int lane = threadIdx.x % kWarp;
    shift = kLanes == 1 ? 5 : kLanes == 2 ? 4 : plan.warp_channels_shift();
    slice = lane >> shift;
    channel = lane & ((1 << shift) - 1);
  }

  // The q-th own step.
  __device__ __forceinline__ int step(int q) const {
    return kLanes == 1 ? q : kLanes == 2 ? 2 * q + slice : slice % kRound;
  }
  __device__ __forceinline__ bool writes() const { return kLanes < 4 || slice < kRound; }

  // What the lane that owns step `j` of the round holds of it.
  __device__ __forceinline__ float told(const float (&own)[kOwn], int j) const {
    if constexpr (kLanes == 1) return own[j];
    const int owner = kLanes == 2 ? j % 2 : j;
    return __shfl_sync(kAllLanes, own[kLanes == 2 ? j / 2 : 0], (owner << shift) + channel);
  }

  // Of the own steps, the sums over the channel's lanes.
  __device__ __forceinline__ void totals(const float (&parts)[kRound], float (&own)[kOwn]) const {
    if constexpr (kLanes == 1) {
#pragma unroll
      for (int j = 0; j < kRound; ++j) own[j] = parts[j];
    } else if constexpr (kLanes == 2) {
#pragma unroll
      for (int q = 0; q < kOwn; ++q) own[q] = halved(parts[2 * q], parts[2 * q + 1], slice == 1, 1);
    } else {
      const float even = halved(parts[0], parts[1], slice & 1, 1), odd = halved(parts[2], parts[3], slice & 1, 1);
      float total = halved(even, odd, slice & 2, 2);
      for (int apart = 4 << shift; apart < kWarp; apart <<= 1) total += __shfl_xor_sync(kAllLanes, total, apart);
      own[0] = total;
    }
  }

  // The sum over the channel's lanes of what each holds of its own steps.
  __device__ __forceinline__ float total_of_own(const float (&own)[kOwn]) const {
    float total = own[0];
#pragma unroll
    for (int q = 1; q < kOwn; ++q) total += own[q];
    if constexpr (kLanes >= 2) total += __shfl_xor_sync(kAllLanes, total, 1 << shift);
    if constexpr (kLanes >= 4) total += __shfl_xor_sync(kAllLanes, total, 2 << shift);
    return total;
  }

 private:
  // `first`, or in an upper lane `second`, of this lane and the one `slices` further.
  __device__ __forceinline__ float halved(float first, float second, bool upper, int slices) const {
    const float sent = upper ? first : second;
    return (upper ? second : first) + __shfl_xor_sync(kAllLanes, sent, slices << shift);
  }
};

// --- u, delta, z and y ----------------------------------------------------------------------------------------------

// A lane's own steps of one array, one after the other.
template <class T, int kLanes>
struct Series {
  static constexpr int kOwn = Seat<kLanes>::kOwn;
  T* at;           // of the next own step
  int64_t stride;  // to the own step after it

  // `array`: from the own step that is the first at `first` or after; it may be null if it is never read.
  __device__ __forceinline__ Series(const hcmen_scan& s, const Place& place, const Seat<kLanes>& seat, int64_t first,
                                    int within, const void* array)
      : at(array == nullptr ? nullptr
                            : const_cast<T*>(static_cast<const T*>(array)) +
                                  series_offset(s, place, first + seat.step(0)) + within),
        stride((s.reverse ? -1 : 1) * (kRound / kOwn) * s.channel) {}

  // The own steps of the next round, unconverted, so that nothing waits for them yet. `left`: steps from its first on.
  __device__ __forceinline__ void read(const Seat<kLanes>& seat, int left, T (&to)[kOwn]) {
    if (left >= kRound) {
#pragma unroll
      for (int q = 0; q < kOwn; ++q) {
        to[q] = *at;
        at += stride;
      }
    } else {
#pragma unroll
      for (int q = 0; q < kOwn; ++q) to[q] = seat.step(q) < left ? at[q * stride] : T();
    }
  }

  __device__ __forceinline__ void write(const Seat<kLanes>& seat, int left, const float (&from)[kOwn]) {
    if (left >= kRound) {
#pragma unroll
      for (int q = 0; q < kOwn; ++q) {
        narrow(from[q], at);
        at += stride;
      }
    } else {
#pragma unroll
      for (int q = 0; q < kOwn; ++q) {
        if (seat.step(q) < left) narrow(from[q], at + q * stride);
      }
    }
  }
};

// What the own steps of a round are scanned with.
template <int kOwn>
struct Inputs {
  float d[kOwn], input[kOwn];  // the step size, times u
  float skip[kOwn];            // D u
};

template <class T, int kLanes, int kOwn>
__device__ __forceinline__ Inputs<kOwn> round_inputs(const hcmen_scan& s, const Seat<kLanes>& seat, int left, float bias,
                                                     float D, const T (&u)[kOwn], const T (&delta)[kOwn]) {
  Inputs<kOwn> in;
#pragma unroll
  for (int q = 0; q < kOwn; ++q) in.d[q] = widened(delta[q]) + bias;
  if (s.delta_softplus) {
#pragma unroll
    for (int q = 0; q < kOwn; ++q) in.d[q] = step::softplus(in.d[q]);
  }
  if (left < kRound) {
#pragma unroll
    for (int q = 0; q < kOwn; ++q) {
      if (seat.step(q) >= left) in.d[q] = 0.0f;
    }
  }
#pragma unroll
  for (int q = 0; q < kOwn; ++q) {
    in.input[q] = in.d[q] * widened(u[q]);
    in.skip[q] = D * widened(u[q]);
  }
  return in;
}

// --- states ---------------------------------------------------------------------------------------------------------

// [first, first + kStates) of `count` states that lie side by side, zeros past the end.
template <int kStates>
__device__ __forceinline__ void read_states(const float* from, int first, int count, bool four, float (&to)[kStates]) {
#pragma unroll
  for (int p = 0; p < kStates; p += 4) {
    float some[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (four) {
      if (first + p < count) load(from + first + p, some);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + p + i < count) some[i] = from[first + p + i];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) to[p + i] = some[i];
  }
}

template <int kStates>
__device__ __forceinline__ void write_states(const float (&from)[kStates], int first, int count, float* to) {
#pragma unroll
  for (int p = 0; p < kStates; ++p) {
    if (first + p < count) to[first + p] = from[p];
  }
}

// --- B and C --------------------------------------------------------------------------------------------------------

// B and C of a tile on their way into shared memory, where they lie as [step][B, C][lanes][slice_stride]. Of `threads`
// threads each takes one vector of four states ahead; what that leaves is read when it is put there.
template <class T, int kStates, int kLanes>
struct Projections {
  static constexpr int kStride = slice_stride(kStates), kVectors = kStates / 4;
  int thread, threads, lanes_shift, tile;
  // This thread's vector: its step in the tile, its place in shared memory, where it comes from in the next tile.
  int k, to;
  bool there;
  const T* from;
  int64_t advance;
  Four<T> ahead;

  // `first`: of the tile's steps in scanning order.
  __device__ __forceinline__ Projections(const hcmen_scan& s, const Layout& plan, const Place& at, bool four,
                                         int64_t first, int tile_steps, int my_thread, int thread_count)
      : thread(my_thread), threads(thread_count), lanes_shift(kLanes == 4 ? plan.lanes_shift : kLanes / 2),
        tile(tile_steps), ahead{} {
    int n;
    bool of_C;
    place_of(thread, k, of_C, n, to);
    there = four && k < tile && n < s.state;
    from = static_cast<const T*>(of_C ? s.C : s.B) + projection_offset(s, at, first + k) + n;
    advance = (s.reverse ? -1 : 1) * tile * s.group * s.state;
  }

  __device__ __forceinline__ int row() const { return kStride << lanes_shift; }

  // Of vector number i: its step, its state, and where it goes.
  __device__ __forceinline__ void place_of(int i, int& step, bool& of_C, int& n, int& place) const {
    const int slice = i / kVectors, p = i % kVectors * 4, lane = slice & ((1 << lanes_shift) - 1);
    const int line = slice >> lanes_shift;
    step = line >> 1;
    of_C = line & 1;
    n = lane * kStates + p;
    place = line * row() + lane * kStride + p;
  }

  // Asks for this thread's vector of the tile that has `steps` steps, and goes on to the next.
  __device__ __forceinline__ void fetch(int steps) {
    ahead = Four<T>{};
    if (there && k < steps) ahead = *reinterpret_cast<const Four<T>*>(from);
    from += advance;
  }

  // Puts the tile that begins at step `first` into `buffer`.
  __device__ __forceinline__ void put(const hcmen_scan& s, const Place& at, bool four, int64_t first, int steps,
                                      float* buffer) const {
    const int count = (2 * tile * kVectors) << lanes_shift;
    int i = thread;
    if (four) {
      if (i < count) place_vector(ahead, buffer + to);
      i += threads;
    }
#pragma unroll 1
    for (; i < count; i += threads) {
      int step, n, place;
      bool of_C;
      place_of(i, step, of_C, n, place);
      Four<T> x{};
      if (step < steps) {
        const T* const source = static_cast<const T*>(of_C ? s.C : s.B) + projection_offset(s, at, first + step) + n;
        if (four) {
          if (n < s.state) x = *reinterpret_cast<const Four<T>*>(source);
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (n + e < s.state) x.at[e] = source[e];
          }
        }
      }
      place_vector(x, buffer + place);
    }
  }

 private:
  static __device__ __forceinline__ void place_vector(const Four<T>& x, float* to) {
    float wide[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) wide[e] = widened(x.at[e]);
    store(wide, to);
  }
};

// --- a round --------------------------------------------------------------------------------------------------------

// `my_B`: B of the round's first step, this lane's states; its C lies `row` floats further, the next step twice that.
// With kY `parts` gets this lane's part of the outputs.
template <int kStates, int kLanes, bool kY>
__device__ __forceinline__ void scan_round(const Seat<kLanes>& seat, const Inputs<Seat<kLanes>::kOwn>& in,
                                           const float* my_B, int row, const float (&rate)[kStates],
                                           float (&h)[kStates], float (&parts)[kRound]) {
#pragma unroll
  for (int j = 0; j < kRound; ++j) {
    const float d = seat.told(in.d, j), input = seat.told(in.input, j);
    parts[j] = 0.0f;
    if constexpr (kY && kLanes == 1) parts[j] = in.skip[j];
#pragma unroll
    for (int p = 0; p < kStates; p += 4) {
      float B[4], C[4];
      load(my_B + 2 * j * row + p, B);
      if constexpr (kY) load(my_B + (2 * j + 1) * row + p, C);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        h[p + i] = step::advance(h[p + i], d, rate[p + i], input, B[i]);
        if constexpr (kY) parts[j] = fmaf(C[i], h[p + i], parts[j]);
      }
    }
  }
}

// Writes the outputs of the own steps.
template <class T, int kLanes, int kOwn>
__device__ __forceinline__ void finish_round(const hcmen_scan& s, const Seat<kLanes>& seat, Series<T, kLanes>& to,
                                             int left, const Inputs<kOwn>& in, const float (&parts)[kRound],
                                             const T (&z)[kOwn]) {
  float y[kOwn];
  seat.totals(parts, y);
  if constexpr (kLanes > 1) {
#pragma unroll
    for (int q = 0; q < kOwn; ++q) y[q] += in.skip[q];
  }
  if (s.z) {
#pragma unroll
    for (int q = 0; q < kOwn; ++q) y[q] *= step::silu(widened(z[q]));
  }
  to.write(seat, left, y);
}

// --- kernels --------------------------------------------------------------------------------------------------------

constexpr int kForwardThreads = kMostChannelWarps * kWarp;
// Blocks of a multiprocessor at least, which leaves 128 registers; where that is too few, 168.
constexpr int forward_blocks(int states, int lanes) { return states == 12 || (states == 16 && lanes == 4) ? 3 : 4; }

template <class T, int kStates, int kLanes, int kMode>
__global__ void __launch_bounds__(kForwardThreads, forward_blocks(kStates, kLanes)) scan_forward_kernel(const ForwardArguments a) {
  constexpr int kOwn = Seat<kLanes>::kOwn;
  const hcmen_scan& s = a.s;
  const Layout& plan = a.plan;
  const Seat<kLanes> seat(plan);
  const int64_t starts = plan.chunks - 1;  // chunks that another one follows
  const Place at = block_place(s, plan.channel_blocks, plan.block_channels(), kMode == kChunks ? starts : plan.chunks);
  const int place = (threadIdx.x / kWarp << seat.shift) + seat.channel;
  const bool own = place < at.count;
  const int within = own ? place : 0;
  const int64_t channel = at.channel + within;
  const int64_t begin = at.chunk * plan.chunk;
  const int count = (int)(s.time - begin < plan.chunk ? s.time - begin : plan.chunk);  // steps
  const int tile = plan.steps, first_state = seat.slice * kStates;

  Series<T, kLanes> from_u(s, at, seat, begin, within, s.u), from_delta(s, at, seat, begin, within, s.delta);
  Series<T, kLanes> from_z(s, at, seat, begin, within, s.z), to_y(s, at, seat, begin, within, s.y);
  T u[kOwn], delta[kOwn], z[kOwn];
  from_u.read(seat, count, u);
  from_delta.read(seat, count, delta);
  Projections<T, kStates, kLanes> projections(s, plan, at, a.four, begin, tile, threadIdx.x, blockDim.x);
  projections.fetch(count);

  const float bias = s.delta_bias[channel];
  const float D = kMode == kOutputs ? s.D[channel] : 0.0f;
  float rate[kStates], h[kStates], chunk_steps = 0.0f;
  read_states(s.A + channel * s.state, first_state, (int)s.state, a.four, rate);
  if (kMode != kChunks && at.chunk > 0) {
#pragma unroll
    for (int p = 0; p < kStates; ++p) {
      const int n = first_state + p;
      h[p] = n < s.state ? a.ends[((at.batch * starts + at.chunk - 1) * s.state + n) * s.channel + channel] : 0.0f;
    }
  } else if (kMode != kChunks && s.initial_state) {
    read_states(s.initial_state + (at.batch * s.channel + channel) * s.state, first_state, (int)s.state, a.four, h);
  } else {
#pragma unroll
    for (int p = 0; p < kStates; ++p) h[p] = 0.0f;
  }
#pragma unroll
  for (int p = 0; p < kStates; ++p) rate[p] *= step::kLog2e;

  const int row = projections.row();
  float* buffer = shared_memory();
  float* other = buffer + 2 * tile * row;
  projections.put(s, at, a.four, begin, count, buffer);
  __syncthreads();

  for (int done = 0; done < count; done += tile) {
    const int remaining = count - done;
    if (remaining > tile) projections.fetch(remaining - tile);
    const int here = remaining < tile ? remaining : tile;
    const float* my_B = buffer + seat.slice * Projections<T, kStates, kLanes>::kStride;
    for (int k = 0; k < here; k += kRound) {
      const int left = remaining - k;
      float parts[kRound];
      if (kMode == kOutputs && s.z) from_z.read(seat, left, z);
      const Inputs<kOwn> in = round_inputs(s, seat, left, bias, D, u, delta);
      if (left > kRound) {
        from_u.read(seat, left - kRound, u);
        from_delta.read(seat, left - kRound, delta);
      }
      scan_round<kStates, kLanes, kMode == kOutputs>(seat, in, my_B, row, rate, h, parts);
      my_B += 2 * kRound * row;
      if (kMode == kOutputs) {
        finish_round(s, seat, to_y, own && seat.writes() ? left : 0, in, parts, z);
      } else {
#pragma unroll
        for (int q = 0; q < kOwn; ++q) chunk_steps += in.d[q];
      }
    }
    if (remaining > tile) {
      projections.put(s, at, a.four, begin + done + tile, remaining - tile, other);
      float* const swap = buffer;
      buffer = other;
      other = swap;
      __syncthreads();
    }
  }

  if (kMode == kChunks) {
    if constexpr (kLanes >= 2) chunk_steps += __shfl_xor_sync(kAllLanes, chunk_steps, 1 << seat.shift);
    if constexpr (kLanes >= 4) chunk_steps += __shfl_xor_sync(kAllLanes, chunk_steps, 2 << seat.shift);
    if (!own) return;
#pragma unroll
    for (int p = 0; p < kStates; ++p) {
      const int n = first_state + p;
      if (n < s.state) a.ends[((at.batch * starts + at.chunk) * s.state + n) * s.channel + channel] = h[p];
    }
    if (seat.slice == 0) a.sums[(at.batch * starts + at.chunk) * s.channel + channel] = chunk_steps;
  }
  if (kMode == kOutputs && s.last_state && own && at.chunk == starts) {
    write_states(h, first_state, (int)s.state, s.last_state + (at.batch * s.channel + channel) * s.state);
  }
}

// Two blocks of a multiprocessor for the kernel of four lanes and 16 states, which most short sequences get.
template <class T, int kStates, int kLanes>
__global__ void __launch_bounds__(kMostTimeWarps* kWarp, kStates == 4 && kLanes == 4 ? 2 : 1)
    scan_split_kernel(const ForwardArguments a) {
  constexpr int kOwn = Seat<kLanes>::kOwn;
  const hcmen_scan& s = a.s;
  const Layout& plan = a.plan;
  const Seat<kLanes> seat(plan);
  const Place at = block_place(s, plan.channel_blocks, plan.block_channels(), 1);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool own = seat.channel < at.count;
  const int within = own ? seat.channel : 0;
  const int64_t channel = at.channel + within;
  const int first_state = seat.slice * kStates;
  const int row = plan.row();
  float* const my_projections = shared_memory() + warp * kRound * 2 * row;
  float* const exchange = shared_memory() + plan.projections();

  float rate[kStates], state[kStates];
  for (int64_t first = 0; first < s.time; first += plan.tile()) {
    // All steps of a warp may lie past the end.
    const int64_t mine = first + warp * kRound;
    const int left = (int)(s.time - mine < 0 ? 0 : s.time - mine < kRound ? s.time - mine : kRound);
    const bool more = first + plan.tile() < s.time;
    Series<T, kLanes> to_y(s, at, seat, mine, within, s.y);
    T u[kOwn], delta[kOwn], z[kOwn];
    Series<T, kLanes>(s, at, seat, mine, within, s.u).read(seat, left, u);
    Series<T, kLanes>(s, at, seat, mine, within, s.delta).read(seat, left, delta);
    if (s.z) Series<T, kLanes>(s, at, seat, mine, within, s.z).read(seat, left, z);
    Projections<T, kStates, kLanes> projections(s, plan, at, a.four, mine, kRound, lane, kWarp);
    projections.fetch(left);
    const float bias = s.delta_bias[channel], D = s.D[channel];
    if (first == 0) {
      read_states(s.A + channel * s.state, first_state, (int)s.state, a.four, rate);
      if (s.initial_state) {
        read_states(s.initial_state + (at.batch * s.channel + channel) * s.state, first_state, (int)s.state, a.four,
                    state);
      } else {
#pragma unroll
        for (int p = 0; p < kStates; ++p) state[p] = 0.0f;
      }
#pragma unroll
      for (int p = 0; p < kStates; ++p) rate[p] *= step::kLog2e;
    }
    projections.put(s, at, a.four, mine, left, my_projections);
    __syncwarp();

    float parts[kRound], h[kStates];
    const Inputs<kOwn> in = round_inputs(s, seat, left, bias, D, u, delta);
#pragma unroll
    for (int p = 0; p < kStates; ++p) h[p] = 0.0f;
    const float* const my_B = my_projections + seat.slice * Projections<T, kStates, kLanes>::kStride;
    scan_round<kStates, kLanes, false>(seat, in, my_B, row, rate, h, parts);
    const float sum = seat.total_of_own(in.d);
    float* const my_exchange = exchange + warp * 2 * kStates * kWarp + lane;
#pragma unroll
    for (int p = 0; p < kStates; ++p) {
      my_exchange[p * kWarp] = h[p];
      my_exchange[(kStates + p) * kWarp] = step::power_of_two(rate[p] * sum);
    }
    __syncthreads();
    const int upto = more ? plan.time_warps : warp;
    for (int w = 0; w < upto; ++w) {
      const float* const other = exchange + w * 2 * kStates * kWarp + lane;
#pragma unroll
      for (int p = 0; p < kStates; ++p) {
        if (w == warp) h[p] = state[p];
        state[p] = fmaf(other[(kStates + p) * kWarp], state[p], other[p * kWarp]);
      }
    }
    if (!more) {
#pragma unroll
      for (int p = 0; p < kStates; ++p) h[p] = state[p];
    }
    // The way from state to state is not kept in all its multiples since the round before: 16 states of four lanes would
    // spill on sm_80 and 120, four of four on sm_100 and 120.
    scan_round<kStates, kLanes, true>(seat, in, my_B, anew_but_on_90(row), rate, h, parts);
    finish_round(s, seat, to_y, own && seat.writes() ? left : 0, in, parts, z);
    if (!more && s.last_state && own && warp == plan.time_warps - 1) {
      write_states(h, first_state, (int)s.state, s.last_state + (at.batch * s.channel + channel) * s.state);
    }
    // The exchange, and this warp's B and C, are written again.
    if (more) __syncthreads();
  }
}

// Ends of chunks from a zero state -> states after the chunks. One thread for each (batch, state, channel).
constexpr int kCarryThreads = 64;
// Chunks whose ends are read before the first of them is used: a store may lie where the next load does, so that each
// would wait for the one before it.
constexpr int kCarriedAtOnce = 8;

__global__ void __launch_bounds__(kCarryThreads) scan_carry_kernel(const ForwardArguments a) {
  const hcmen_scan& s = a.s;
  const int64_t index = (int64_t)blockIdx.x * kCarryThreads + threadIdx.x;
  if (index >= s.batch * s.state * s.channel) return;
  const int64_t c = index % s.channel, n = index / s.channel % s.state, b = index / s.channel / s.state;
  const float rate = s.A[c * s.state + n] * step::kLog2e;
  float state = s.initial_state ? s.initial_state[(b * s.channel + c) * s.state + n] : 0.0f;
  const int64_t starts = a.plan.chunks - 1, stride = s.state * s.channel;
  float* ends = a.ends + (b * starts * s.state + n) * s.channel + c;
  const float* sums = a.sums + b * starts * s.channel + c;
  for (int64_t j = 0; j < starts; j += kCarriedAtOnce) {
    step::Chunk chunk[kCarriedAtOnce];
#pragma unroll
    for (int q = 0; q < kCarriedAtOnce; ++q) {
      if (j + q < starts) chunk[q] = {sums[q * s.channel], ends[q * stride]};
    }
#pragma unroll
    for (int q = 0; q < kCarriedAtOnce; ++q) {
      if (j + q >= starts) break;
      state = step::after(chunk[q], rate, state);
      ends[q * stride] = state;
    }
    ends += kCarriedAtOnce * stride;
    sums += kCarriedAtOnce * s.channel;
  }
}

// --- launches -------------------------------------------------------------------------------------------------------

using ForwardKernel = void (*)(ForwardArguments);

// Null where states_per_lane gives no such kernel.
template <class T, int kMode>
ForwardKernel forward_kernel(int lanes, int states) {
  switch (lanes < 4 ? lanes * 100 + states : 400 + states) {
    case 104: return scan_forward_kernel<T, 4, 1, kMode>;
    case 108: return scan_forward_kernel<T, 8, 1, kMode>;
    case 112: return scan_forward_kernel<T, 12, 1, kMode>;
    case 116: return scan_forward_kernel<T, 16, 1, kMode>;
    case 208: return scan_forward_kernel<T, 8, 2, kMode>;
    case 404: return scan_forward_kernel<T, 4, 4, kMode>;
    case 408: return scan_forward_kernel<T, 8, 4, kMode>;
    case 416: return scan_forward_kernel<T, 16, 4, kMode>;
    default: return nullptr;
  }
}

template <class T>
ForwardKernel split_kernel(int lanes, int states) {
  switch (lanes < 4 ? lanes * 100 + states : 400 + states) {
    case 104: return scan_split_kernel<T, 4, 1>;
    case 208: return scan_split_kernel<T, 8, 2>;
    case 404: return scan_split_kernel<T, 4, 4>;
    case 408: return scan_split_kernel<T, 8, 4>;
    case 416: return scan_split_kernel<T, 16, 4>;
    default: return nullptr;
  }
}

int launch_scan(ForwardKernel kernel, const ForwardArguments& a, int64_t chunks, void* stream) {
  const int64_t blocks = a.s.batch * a.s.group * a.plan.channel_blocks * chunks;
  return launch(kernel, blocks, a.plan.warps() * kWarp, a.plan.shared_bytes(), stream, a);
}

template <class T>
int forward(const hcmen_scan& s, const Layout& plan, const hcmen_cuda_launch& with) {
  ForwardArguments a{};
  a.s = s;
  a.plan = plan;
  a.four = four_at_once(s);
  a.ends = static_cast<float*>(with.workspace);
  a.sums = a.ends + rounded(s.batch * (plan.chunks - 1) * s.state * s.channel);
  const int lanes = plan.lanes(), states = plan.states;
  if (plan.chunks > 1) {
    if (const int status = launch_scan(forward_kernel<T, kChunks>(lanes, states), a, plan.chunks - 1, with.stream)) {
      return status;
    }
    const int64_t blocks = ceil_div(s.batch * s.state * s.channel, kCarryThreads);
    if (const int status = launch(scan_carry_kernel, blocks, kCarryThreads, 0, with.stream, a)) return status;
  }
  const ForwardKernel kernel =
      plan.time_warps > 1 ? split_kernel<T>(lanes, states) : forward_kernel<T, kOutputs>(lanes, states);
  return launch_scan(kernel, a, plan.chunks, with.stream);
}

template <class T>
int load_kernels_of() {
  for (int lanes : {1, 2, 4}) {
    for (int states : {4, 8, 12, 16}) {
      for (const ForwardKernel kernel : {forward_kernel<T, kOutputs>(lanes, states), split_kernel<T>(lanes, states),
                                         forward_kernel<T, kChunks>(lanes, states)}) {
        if (kernel == nullptr) continue;
        if (const int status = load_kernel(kernel)) return status;
      }
    }
  }
  return HCMEN_OK;
}

}  // namespace

int load_forward_kernels() {
  if (const int status = load_kernel(scan_carry_kernel)) return status;
  if (const int status = load_kernels_of<float>()) return status;
  return load_kernels_of<__half>();
}

}  // namespace cuda
}  // namespace hcmen

extern "C" {

HCMEN_API int hcmen_cuda_selective_scan_forward(const hcmen_scan* scan, const hcmen_cuda_launch* launch) {
  using namespace hcmen::cuda;
  if (!scan || !launch) return HCMEN_BAD_ARGUMENT;
  if (const int status = check_sizes(*scan, HCMEN_CUDA_FORWARD_STATES)) return status;
  if (const int status = check_inputs(*scan)) return status;
  if (!scan->y) return HCMEN_BAD_ARGUMENT;
  Layout plan;
  if (const int status = plan_forward(*scan, launch, &plan)) return status;
  if (const int status = check_workspace(*launch, forward_floats(*scan, plan))) return status;
  return scan->dtype == HCMEN_FLOAT16 ? forward<__half>(*scan, plan, *launch) : forward<float>(*scan, plan, *launch);
}

}  // extern "C"
