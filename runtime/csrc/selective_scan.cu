// The selective scan on a CUDA device. The arithmetic is in scan_step.h; here it is shared out.
//
// A warp is cut in two directions: `lanes` lanes share the states of one channel, 32 / lanes channels lie side by side,
// so that neighbouring lanes read neighbouring channels. A lane keeps its states and their decay rates in registers. A
// block has `channel_warps` such warps side by side over channels of one group, and `time_warps` of them one after the
// other in time. It takes its steps in tiles:
//
//   stage    all threads read the tile's u and delta once, four channels at a time, turn delta into step sizes, and put
//            both in shared memory, with the tile's B and C, which all channels of the block use
//   scan     with time_warps > 1 each warp first finds what its steps make of a zero state; these chunks are put
//            together (scan_step.h), so that each warp knows the states that its steps start from. Then, and with one
//            time warp at once, the outputs: they take the place of the step sizes
//   finish   all threads add D u, apply the gate, and write y, four channels at a time
//
// A long sequence at a small batch gives too few blocks. It is cut into chunks: a first launch finds what each chunk
// but the last makes of a zero state, a second one walks over these and leaves the states that each chunk starts from,
// a third one computes outputs, all chunks at once.
//
// The backward pass keeps the states at the start of every tile (a first launch), then takes the tiles from the last to
// the first and recomputes their states in registers. Gradients of B and C are sums over channels: over the lanes of a
// warp by exchanging halves, over the warps of a block in shared memory, over blocks, as those of A, D and delta_bias
// over the batch, from partial sums in the workspace. Every sum has one order.
//
// What lies past an end (of time, channels, states) is staged as zeros: a step of size zero leaves every state as it
// was, a state with B = C = 0 stays zero.
#include "cuda_launch.h"
#include "scan_step.h"

namespace hcmen {
namespace cuda {
namespace {

constexpr int kMostThreads = 512;
// Steps whose outputs are held in registers before they are written to shared memory, so that reads of the next step
// need not wait for writes.
constexpr int kStepsAtOnce = 4;
// Loads of a thread that are under way together.
constexpr int kLoadsAtOnce = 4;

// Floats between the states of neighbouring lanes in shared memory: lanes read four at a time, and these strides keep
// them off each other's banks.
__host__ __device__ constexpr int slice_stride(int states) { return states == 8 ? 12 : states == 16 ? 20 : states; }

// --- plans ----------------------------------------------------------------------------------------------------------

struct Layout {
  int lanes_shift;          // log2 of the lanes that share a channel
  int states;               // of a lane
  int channel_warps_shift;  // log2
  int time_warps;
  int steps;                // of a warp in a tile
  int64_t channel_blocks;   // of a group
  int64_t chunk;            // steps
  int64_t chunks;

  HCMEN_HD int lanes() const { return 1 << lanes_shift; }
  HCMEN_HD int warp_channels_shift() const { return 5 - lanes_shift; }
  HCMEN_HD int block_channels_shift() const { return 5 - lanes_shift + channel_warps_shift; }
  HCMEN_HD int block_channels() const { return 1 << block_channels_shift(); }
  HCMEN_HD int warps() const { return time_warps << channel_warps_shift; }
  HCMEN_HD int tile() const { return steps * time_warps; }
  HCMEN_HD int row() const { return lanes() * slice_stride(states); }  // of B or C in shared memory

  // Shared memory, in floats: step sizes and u; B and C; ends and decays of the time warps, and their sums of steps.
  HCMEN_HD int series() const { return tile() << block_channels_shift(); }
  HCMEN_HD int projections() const { return tile() * row(); }
  HCMEN_HD int exchange() const { return time_warps == 1 ? 0 : warps() * 2 * states * kWarp; }
  HCMEN_HD int sums() const { return time_warps == 1 ? 0 : time_warps << block_channels_shift(); }
  int64_t shared_bytes() const {
    return (int64_t)sizeof(float) * (2 * (int64_t)series() + 2 * (int64_t)projections() + exchange() + sums());
  }
};

int log2_of(int64_t power) {
  int shift = 0;
  while ((int64_t)1 << shift < power) ++shift;
  return shift;
}

// The least number of states per lane that kernels exist for.
int states_per_lane(int64_t state, int lanes) {
  const int64_t needed = ceil_div(state, lanes);
  for (int states : {4, 8, 12, 16}) {
    if (states >= needed) return states;
  }
  return 0;
}

int check_sizes(const hcmen_scan& s, int64_t most_states) {
  if (!all_positive({s.batch, s.time, s.channel, s.state, s.group})) return HCMEN_BAD_ARGUMENT;
  if (s.channel % s.group != 0 || s.state > most_states || s.channel > INT32_MAX) return HCMEN_BAD_ARGUMENT;
  if (s.dtype != HCMEN_FLOAT32 && s.dtype != HCMEN_FLOAT16) return HCMEN_BAD_ARGUMENT;
  // Every array, and every part of a workspace, holds fewer elements than one of these.
  if (!addressable({s.batch, s.time, s.channel, s.state}) || !addressable({s.batch, s.time, s.channel, 2}) ||
      !addressable({s.batch, s.channel, s.state + 2}) ||
      !addressable({s.batch, s.time, s.group, s.state, s.channel / s.group, 2})) {
    return HCMEN_BAD_ARGUMENT;
  }
  return HCMEN_OK;
}

// How a forward scan is shared out, by its sizes alone: the same on every device. The numbers aim at some ten warps on
// each of a hundred multiprocessors; smaller devices get more than they need, which costs them the work done twice.
// They are reasoned, not measured: benchmarks/scan_cuda.py --tune measures.
constexpr int64_t kEnoughWarps = 1024;
constexpr int64_t kEnoughBlocks = 256;
constexpr int64_t kLeastChunk = 512;

// Not const-correct wishes: `wish` may be null.
int plan_forward(const hcmen_scan& s, const hcmen_cuda_launch* wish, Layout* plan) {
  const int64_t group_channels = s.channel / s.group;
  const int wished_lanes = wish ? wish->lanes_per_channel : 0;
  const int wished_warps = wish ? wish->time_warps : 0;
  const int64_t wished_chunk = wish ? wish->steps_per_chunk : 0;
  if (wished_lanes < 0 || wished_lanes > kWarp || (wished_lanes & (wished_lanes - 1)) != 0) return HCMEN_BAD_ARGUMENT;
  if (wished_warps < 0 || wished_warps > 16 || (wished_warps & (wished_warps - 1)) != 0) return HCMEN_BAD_ARGUMENT;
  if (wished_chunk < -1) return HCMEN_BAD_ARGUMENT;

  // Warps if every channel had `lanes` lanes, one warp in time.
  const auto warps_with = [&](int lanes) { return s.batch * s.group * ceil_div(group_channels, kWarp / lanes); };
  Layout p{};
  int lanes = 1;
  while (states_per_lane(s.state, lanes) == 0) lanes *= 2;
  if (wished_lanes) {
    lanes = wished_lanes;
  } else {
    // More lanes for a channel shorten every step, as long as each still has four states.
    while (lanes < kWarp && warps_with(lanes) < kEnoughWarps && states_per_lane(s.state, lanes) > 4) lanes *= 2;
  }
  p.states = states_per_lane(s.state, lanes);
  if (p.states == 0) return HCMEN_BAD_ARGUMENT;
  p.lanes_shift = log2_of(lanes);

  const int64_t warps = warps_with(lanes);
  const bool few = warps < kEnoughWarps;
  // Wide blocks share B and C among many channels; few channels of a block make many blocks. A row of eight channels
  // is what memory hands out at least.
  const int64_t channels = few ? 8 : lanes <= 4 ? 128 / lanes : 32;
  int64_t channel_warps = channels * lanes / kWarp;
  if (channel_warps < 1) channel_warps = 1;
  if (channel_warps > 8) channel_warps = 8;
  while (channel_warps > 1 && (channel_warps / 2) * (kWarp / lanes) >= group_channels) channel_warps /= 2;
  p.channel_warps_shift = log2_of(channel_warps);
  p.steps = 8;

  p.time_warps = 1;
  if (wished_warps) {
    p.time_warps = wished_warps;
  } else {
    while (p.time_warps < 8 && warps * p.time_warps < kEnoughWarps && p.time_warps * p.steps < s.time) p.time_warps *= 2;
  }
  while (p.warps() * kWarp > kMostThreads && p.channel_warps_shift > 0) --p.channel_warps_shift;
  while (p.time_warps > 1 && (p.warps() * kWarp > kMostThreads || p.shared_bytes() > kMostSharedBytes)) {
    p.time_warps /= 2;
  }
  if (p.time_warps == 1) {
    // Longer tiles have fewer barriers.
    Layout longer = p;
    longer.steps = 16;
    if (longer.shared_bytes() <= kMostSharedBytes / 2) p = longer;
  }
  while (p.shared_bytes() > kMostSharedBytes && p.channel_warps_shift > 0) --p.channel_warps_shift;
  while (p.shared_bytes() > kMostSharedBytes && p.steps > kStepsAtOnce) p.steps /= 2;
  if (p.shared_bytes() > kMostSharedBytes) return HCMEN_BAD_ARGUMENT;
  p.channel_blocks = ceil_div(group_channels, p.block_channels());

  const int64_t blocks = s.batch * s.group * p.channel_blocks;
  p.chunk = s.time;
  if (wished_chunk > 0) {
    p.chunk = wished_chunk < s.time ? wished_chunk : s.time;
  } else if (wished_chunk == 0 && blocks < kEnoughBlocks && s.time >= 2 * kLeastChunk) {
    int64_t chunks = ceil_div(kEnoughBlocks, blocks);
    if (chunks > s.time / kLeastChunk) chunks = s.time / kLeastChunk;
    p.chunk = ceil_div(ceil_div(s.time, chunks), p.tile()) * p.tile();
  }
  p.chunks = ceil_div(s.time, p.chunk);
  // In doubles: the product may not fit.
  if ((double)blocks * (double)p.chunks > (double)kMostBlocks) return HCMEN_BAD_ARGUMENT;
  *plan = p;
  return HCMEN_OK;
}

// --- forward --------------------------------------------------------------------------------------------------------

enum Mode {
  kOutputs,      // y, and the last state
  kChunks,       // what a chunk makes of a zero state
  kCheckpoints,  // the states at the start of every tile
};

struct ForwardArguments {
  hcmen_scan s;
  Layout plan;
  bool four;      // channels and addresses allow four at a time
  float* ends;    // [batch, chunks - 1, state, channel]
  float* sums;    // [batch, chunks - 1, channel]
  float* starts;  // kCheckpoints: [batch, tiles, state, channel]
};

// The place of a block in the arrays.
struct Place {
  int64_t batch, chunk, channel;  // the first channel of the block
  int group, count;               // channels of the block that exist
};

__device__ __forceinline__ Place block_place(const hcmen_scan& s, int64_t channel_blocks, int block_channels,
                                             int64_t chunks) {
  int64_t index = blockIdx.x;
  Place p;
  const int64_t first = index % channel_blocks * block_channels;
  index /= channel_blocks;
  const int64_t group_channels = s.channel / s.group;
  p.group = (int)(index % s.group);
  index /= s.group;
  p.chunk = index % chunks;
  p.batch = index / chunks;
  p.channel = p.group * group_channels + first;
  p.count = (int)(group_channels - first < block_channels ? group_channels - first : block_channels);
  return p;
}

// Where the block's first channel lies in u, delta, z and y, at the step scanned as number `index`.
__device__ __forceinline__ int64_t series_offset(const hcmen_scan& s, const Place& at, int64_t index) {
  return (at.batch * s.time + step::place(index, s.time, s.reverse)) * s.channel + at.channel;
}

// Where the group's states begin in B and C, at the step scanned as number `index`.
__device__ __forceinline__ int64_t projection_offset(const hcmen_scan& s, const Place& at, int64_t index) {
  return ((at.batch * s.time + step::place(index, s.time, s.reverse)) * s.group + at.group) * s.state;
}

// Step sizes and u of a tile into [tile][block_channels]. Thread and element belong together in the same way wherever a
// loop runs over (step, channel) of a tile: what one thread staged, only that thread overwrites.
template <int kCount, class T>
__device__ __forceinline__ void stage_series(const hcmen_scan& s, const Place& at, int64_t first, int steps, int tile,
                                             int row_shift, float* d_to, float* u_to) {
  const T* const u = static_cast<const T*>(s.u);
  const T* const delta = static_cast<const T*>(s.delta);
  const int mask = (1 << row_shift) - 1;
  const int size = tile << row_shift, stride = blockDim.x * kCount;
  for (int start = threadIdx.x * kCount; start < size; start += kLoadsAtOnce * stride) {
    float d4[kLoadsAtOnce][kCount], u4[kLoadsAtOnce][kCount];
#pragma unroll
    for (int q = 0; q < kLoadsAtOnce; ++q) {
      const int i = start + q * stride, k = i >> row_shift, c = i & mask;
#pragma unroll
      for (int j = 0; j < kCount; ++j) d4[q][j] = u4[q][j] = 0.0f;
      if (k < steps && c < at.count) {
        const int64_t offset = series_offset(s, at, first + k) + c;
        load<kCount>(u + offset, u4[q]);
        load<kCount>(delta + offset, d4[q]);
      }
    }
#pragma unroll
    for (int q = 0; q < kLoadsAtOnce; ++q) {
      const int i = start + q * stride, k = i >> row_shift, c = i & mask;
      if (i >= size) break;
      if (k < steps && c < at.count) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          d4[q][j] = step::step_size(d4[q][j], s.delta_bias[at.channel + c + j], s.delta_softplus);
        }
      }
      store<kCount>(d4[q], d_to + i);
      store<kCount>(u4[q], u_to + i);
    }
  }
}

// B or C of a tile into [tile][lanes][stride], zeros past the end of states and time.
template <int kStates, class T>
__device__ __forceinline__ void stage_projection(const hcmen_scan& s, const Place& at, const void* from, int64_t first,
                                                 int steps, int tile, int lanes_shift, int stride, float* to) {
  const int count = (tile << lanes_shift) * kStates, mask = (1 << lanes_shift) - 1;
  for (int start = threadIdx.x; start < count; start += kLoadsAtOnce * blockDim.x) {
    float value[kLoadsAtOnce];
#pragma unroll
    for (int q = 0; q < kLoadsAtOnce; ++q) {
      const int i = start + q * blockDim.x, slice = i / kStates, p = i % kStates;
      const int k = slice >> lanes_shift, n = (slice & mask) * kStates + p;
      value[q] = 0.0f;
      if (k < steps && n < s.state) {
        value[q] = widened(static_cast<const T*>(from)[projection_offset(s, at, first + k) + n]);
      }
    }
#pragma unroll
    for (int q = 0; q < kLoadsAtOnce; ++q) {
      const int i = start + q * blockDim.x;
      if (i < count) to[i / kStates * stride + i % kStates] = value[q];
    }
  }
}

// y of a tile from the sums over states and u, both [tile][block_channels].
template <int kCount, class T>
__device__ __forceinline__ void finish_series(const hcmen_scan& s, const Place& at, int64_t first, int steps, int tile,
                                              int row_shift, const float* sums, const float* u_from) {
  const T* const z = static_cast<const T*>(s.z);
  const int mask = (1 << row_shift) - 1;
  const int size = tile << row_shift, stride = blockDim.x * kCount;
  for (int start = threadIdx.x * kCount; start < size; start += kLoadsAtOnce * stride) {
    float z4[kLoadsAtOnce][kCount];
#pragma unroll
    for (int q = 0; q < kLoadsAtOnce; ++q) {
      const int i = start + q * stride, k = i >> row_shift, c = i & mask;
#pragma unroll
      for (int j = 0; j < kCount; ++j) z4[q][j] = 0.0f;
      if (z && k < steps && c < at.count) load<kCount>(z + series_offset(s, at, first + k) + c, z4[q]);
    }
#pragma unroll
    for (int q = 0; q < kLoadsAtOnce; ++q) {
      const int i = start + q * stride, k = i >> row_shift, c = i & mask;
      if (k >= steps || c >= at.count) continue;
      float y4[kCount], u4[kCount];
      load<kCount>(sums + i, y4);
      load<kCount>(u_from + i, u4);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        y4[j] = step::output(y4[j], u4[j], s.D[at.channel + c + j], z != nullptr, z4[q][j]);
      }
      store<kCount>(y4, static_cast<T*>(s.y) + series_offset(s, at, first + k) + c);
    }
  }
}

// kCount consecutive floats of shared memory, four at a time.
template <int kCount>
__device__ __forceinline__ void load_slice(const float* from, float (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    float four[4];
    load<4>(from + i, four);
#pragma unroll
    for (int j = 0; j < 4; ++j) to[i + j] = four[j];
  }
}

template <class T, int kStates, int kMode>
__global__ void __launch_bounds__(kMostThreads, 1) scan_forward_kernel(const ForwardArguments a) {
  constexpr int kStride = slice_stride(kStates);
  const hcmen_scan& s = a.s;
  const Layout& plan = a.plan;
  float* const tile_d = shared_memory();
  float* const tile_u = tile_d + plan.series();
  float* const tile_B = tile_u + plan.series();
  float* const tile_C = tile_B + plan.projections();
  float* const exchange = tile_C + plan.projections();
  float* const warp_sums = exchange + plan.exchange();

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int channel_warp = warp & ((1 << plan.channel_warps_shift) - 1);
  const int time_warp = warp >> plan.channel_warps_shift;
  const int slice = lane >> plan.warp_channels_shift();
  const int within = (channel_warp << plan.warp_channels_shift()) + (lane & ((1 << plan.warp_channels_shift()) - 1));
  const int row_shift = plan.block_channels_shift();
  const int row = plan.row();
  const bool split = plan.time_warps > 1;

  const int64_t starts = plan.chunks - 1;  // chunks that another one follows
  const Place at = block_place(s, plan.channel_blocks, plan.block_channels(), kMode == kChunks ? starts : plan.chunks);
  const bool own = within < at.count;
  const int64_t channel = at.channel + within;
  const int64_t begin = at.chunk * plan.chunk;
  const int64_t end = begin + plan.chunk < s.time ? begin + plan.chunk : s.time;

  float rate[kStates], state[kStates], chunk_steps = 0.0f;
#pragma unroll
  for (int p = 0; p < kStates; ++p) {
    const int n = slice * kStates + p;
    rate[p] = state[p] = 0.0f;
    if (own && n < s.state) {
      rate[p] = s.A[channel * s.state + n] * step::kLog2e;
      if (kMode != kChunks) {
        if (at.chunk > 0) {
          state[p] = a.ends[((at.batch * starts + at.chunk - 1) * s.state + n) * s.channel + channel];
        } else if (s.initial_state) {
          state[p] = s.initial_state[(at.batch * s.channel + channel) * s.state + n];
        }
      }
    }
  }

  const int tile = plan.tile();
  for (int64_t first = begin; first < end; first += tile) {
    const int steps = (int)(end - first < tile ? end - first : tile);
    if (kMode == kCheckpoints) {
      const int64_t number = first / tile, tiles = (s.time + tile - 1) / tile;
#pragma unroll
      for (int p = 0; p < kStates; ++p) {
        const int n = slice * kStates + p;
        if (own && n < s.state) {
          a.starts[((at.batch * tiles + number) * s.state + n) * s.channel + channel] = state[p];
        }
      }
    }

    if (a.four) {
      stage_series<4, T>(s, at, first, steps, tile, row_shift, tile_d, tile_u);
    } else {
      stage_series<1, T>(s, at, first, steps, tile, row_shift, tile_d, tile_u);
    }
    stage_projection<kStates, T>(s, at, s.B, first, steps, tile, plan.lanes_shift, kStride, tile_B);
    if (kMode == kOutputs) {
      stage_projection<kStates, T>(s, at, s.C, first, steps, tile, plan.lanes_shift, kStride, tile_C);
    }
    __syncthreads();

    const int mine = time_warp * plan.steps;  // this warp's first step in the tile
    const float* const my_d = tile_d + (mine << row_shift) + within;
    const float* const my_u = tile_u + (mine << row_shift) + within;
    const float* const my_B = tile_B + mine * row + slice * kStride;
    const float* const my_C = tile_C + mine * row + slice * kStride;

    float h[kStates];
    if (kMode != kOutputs || split) {
      float sum = 0.0f;
#pragma unroll
      for (int p = 0; p < kStates; ++p) h[p] = split ? 0.0f : state[p];
      // All of a warp's steps may lie past the end.
#pragma unroll 4
      for (int k = 0; k < plan.steps; ++k) {
        const float d = my_d[k << row_shift], input = d * my_u[k << row_shift];
        float B[kStates];
        load_slice(my_B + k * row, B);
#pragma unroll
        for (int p = 0; p < kStates; ++p) h[p] = step::advance(h[p], d, rate[p], input, B[p]);
        sum += d;
      }
      if (split) {
        float* const my_exchange = exchange + warp * 2 * kStates * kWarp + lane;
#pragma unroll
        for (int p = 0; p < kStates; ++p) {
          my_exchange[p * kWarp] = h[p];
          my_exchange[(kStates + p) * kWarp] = step::power_of_two(rate[p] * sum);
        }
        if (slice == 0) warp_sums[(time_warp << row_shift) + within] = sum;
        __syncthreads();
        for (int w = 0; w < plan.time_warps; ++w) {
          const float* const other =
              exchange + ((w << plan.channel_warps_shift) + channel_warp) * 2 * kStates * kWarp + lane;
#pragma unroll
          for (int p = 0; p < kStates; ++p) {
            if (w == time_warp) h[p] = state[p];
            state[p] = fmaf(other[(kStates + p) * kWarp], state[p], other[p * kWarp]);
          }
          chunk_steps += warp_sums[(w << row_shift) + within];
        }
      } else {
#pragma unroll
        for (int p = 0; p < kStates; ++p) state[p] = h[p];
        chunk_steps += sum;
      }
    }

    if (kMode == kOutputs) {
      if (!split) {
#pragma unroll
        for (int p = 0; p < kStates; ++p) h[p] = state[p];
      }
      float* const my_y = tile_d + (mine << row_shift) + within;
      for (int k = 0; k < plan.steps; k += kStepsAtOnce) {
        float y[kStepsAtOnce];
#pragma unroll
        for (int j = 0; j < kStepsAtOnce; ++j) {
          const float d = my_d[(k + j) << row_shift], input = d * my_u[(k + j) << row_shift];
          float B[kStates], C[kStates];
          load_slice(my_B + (k + j) * row, B);
          load_slice(my_C + (k + j) * row, C);
          y[j] = 0.0f;
#pragma unroll
          for (int p = 0; p < kStates; ++p) {
            h[p] = step::advance(h[p], d, rate[p], input, B[p]);
            y[j] = fmaf(C[p], h[p], y[j]);
          }
        }
        for (int apart = 1 << plan.warp_channels_shift(); apart < kWarp; apart <<= 1) {
#pragma unroll
          for (int j = 0; j < kStepsAtOnce; ++j) y[j] += __shfl_xor_sync(kAllLanes, y[j], apart);
        }
        // The lanes of a channel have read its step sizes, which are overwritten now.
        __syncwarp();
        if (slice == 0) {
#pragma unroll
          for (int j = 0; j < kStepsAtOnce; ++j) my_y[(k + j) << row_shift] = y[j];
        }
      }
      if (!split) {
#pragma unroll
        for (int p = 0; p < kStates; ++p) state[p] = h[p];
      }
    }

    // B, C and the exchange are read no more, and the outputs are complete.
    __syncthreads();
    if (kMode == kOutputs) {
      if (a.four) {
        finish_series<4, T>(s, at, first, steps, tile, row_shift, tile_d, tile_u);
      } else {
        finish_series<1, T>(s, at, first, steps, tile, row_shift, tile_d, tile_u);
      }
    }
  }

  if (time_warp != 0) return;
  if (kMode == kChunks) {
#pragma unroll
    for (int p = 0; p < kStates; ++p) {
      const int n = slice * kStates + p;
      if (own && n < s.state) {
        a.ends[((at.batch * starts + at.chunk) * s.state + n) * s.channel + channel] = state[p];
      }
    }
    if (own && slice == 0) a.sums[(at.batch * starts + at.chunk) * s.channel + channel] = chunk_steps;
  }
  if (kMode == kOutputs && s.last_state && at.chunk == plan.chunks - 1) {
#pragma unroll
    for (int p = 0; p < kStates; ++p) {
      const int n = slice * kStates + p;
      if (own && n < s.state) s.last_state[(at.batch * s.channel + channel) * s.state + n] = state[p];
    }
  }
}

// Ends of chunks from a zero state -> states after the chunks. One thread for each (batch, state, channel).
constexpr int kCarryThreads = 128;

__global__ void __launch_bounds__(kCarryThreads) scan_carry_kernel(const ForwardArguments a) {
  const hcmen_scan& s = a.s;
  const int64_t index = (int64_t)blockIdx.x * kCarryThreads + threadIdx.x;
  if (index >= s.batch * s.state * s.channel) return;
  const int64_t c = index % s.channel, n = index / s.channel % s.state, b = index / s.channel / s.state;
  const float rate = s.A[c * s.state + n] * step::kLog2e;
  float state = s.initial_state ? s.initial_state[(b * s.channel + c) * s.state + n] : 0.0f;
  const int64_t starts = a.plan.chunks - 1;
#pragma unroll 4
  for (int64_t j = 0; j < starts; ++j) {
    float& end = a.ends[((b * starts + j) * s.state + n) * s.channel + c];
    state = step::after({a.sums[(b * starts + j) * s.channel + c], end}, rate, state);
    end = state;
  }
}

template <class T, int kMode>
int launch_forward(const ForwardArguments& a, int64_t chunks, void* stream) {
  const int64_t blocks = a.s.batch * a.s.group * a.plan.channel_blocks * chunks;
  const int threads = a.plan.warps() * kWarp;
  const int64_t bytes = a.plan.shared_bytes();
  switch (a.plan.states) {
    case 4: return launch(scan_forward_kernel<T, 4, kMode>, blocks, threads, bytes, stream, a);
    case 8: return launch(scan_forward_kernel<T, 8, kMode>, blocks, threads, bytes, stream, a);
    case 12: return launch(scan_forward_kernel<T, 12, kMode>, blocks, threads, bytes, stream, a);
    default: return launch(scan_forward_kernel<T, 16, kMode>, blocks, threads, bytes, stream, a);
  }
}

// Floats of the workspace, rounded up so that the next array is aligned too.
int64_t rounded(int64_t floats) { return ceil_div(floats, 4) * 4; }

int64_t forward_floats(const hcmen_scan& s, const Layout& plan) {
  return rounded(s.batch * (plan.chunks - 1) * s.state * s.channel) +
         rounded(s.batch * (plan.chunks - 1) * s.channel);
}

bool four_at_once(const hcmen_scan& s, const Layout& plan) {
  const int64_t bytes = 4 * (s.dtype == HCMEN_FLOAT16 ? 2 : 4);
  return plan.block_channels() >= 4 && s.channel % 4 == 0 && s.channel / s.group % 4 == 0 && aligned(s.u, bytes) &&
         aligned(s.delta, bytes) && aligned(s.z, bytes) && aligned(s.y, bytes);
}

template <class T>
int forward(const hcmen_scan& s, const Layout& plan, const hcmen_cuda_launch& with) {
  ForwardArguments a{};
  a.s = s;
  a.plan = plan;
  a.four = four_at_once(s, plan);
  if (plan.chunks > 1) {
    a.ends = static_cast<float*>(with.workspace);
    a.sums = a.ends + rounded(s.batch * (plan.chunks - 1) * s.state * s.channel);
    if (const int status = launch_forward<T, kChunks>(a, plan.chunks - 1, with.stream)) return status;
    const int64_t blocks = ceil_div(s.batch * s.state * s.channel, kCarryThreads);
    if (const int status = launch(scan_carry_kernel, blocks, kCarryThreads, 0, with.stream, a)) return status;
  }
  return launch_forward<T, kOutputs>(a, plan.chunks, with.stream);
}

// --- backward -------------------------------------------------------------------------------------------------------

constexpr int kTile = 16;  // steps whose states are recomputed in registers

struct BackwardArguments {
  hcmen_scan s;
  hcmen_scan_grad g;
  int lanes_shift, warps;   // warps side by side over channels; a power of two
  int64_t channel_blocks;   // of a group
  const float* starts;      // [batch, tiles, state, channel]
  float* parts_B;           // [channel_blocks, batch, time, group, state], or dB itself where there is one block
  float* parts_C;
  float* parts_parameters;  // [batch, state + 2, channel]: of A, of D, of delta_bias
};

struct BackwardPlan {
  Layout checkpoints;
  int states, lanes_shift, warps;
  int64_t channel_blocks, tiles;

  int block_channels_shift() const { return 5 - lanes_shift + log2_of(warps); }
  int64_t shared_bytes() const {
    const int64_t row = states << lanes_shift, series = (int64_t)kTile << block_channels_shift();
    const int64_t gradients = warps > 1 ? (int64_t)warps * kTile * 2 * row : 0;
    return (int64_t)sizeof(float) * (6 * series + 2 * kTile * row + gradients);
  }
};

int plan_backward(const hcmen_scan& s, BackwardPlan* plan) {
  const int64_t group_channels = s.channel / s.group;
  BackwardPlan p{};
  p.states = s.state <= 4 * kWarp ? 4 : 8;
  p.lanes_shift = log2_of(ceil_div(s.state, p.states));
  const int warp_channels = kWarp >> p.lanes_shift;
  p.warps = 4;
  while (p.warps > 1 && (p.warps / 2 * warp_channels >= group_channels || p.shared_bytes() > kMostSharedBytes)) {
    p.warps /= 2;
  }
  if (p.shared_bytes() > kMostSharedBytes) return HCMEN_BAD_ARGUMENT;
  p.channel_blocks = ceil_div(group_channels, (int64_t)1 << p.block_channels_shift());
  p.tiles = ceil_div(s.time, kTile);
  // The checkpoints: one chunk, one warp in time, tiles of the same length. With 32 lanes of 8 states the strides in
  // shared memory would not fit.
  const hcmen_cuda_launch wish{nullptr, nullptr, 0, -1, s.state > 4 * kWarp ? 16 : 0, 1};
  if (const int status = plan_forward(s, &wish, &p.checkpoints)) return status;
  p.checkpoints.steps = kTile;
  while (p.checkpoints.shared_bytes() > kMostSharedBytes && p.checkpoints.channel_warps_shift > 0) {
    --p.checkpoints.channel_warps_shift;
  }
  if (p.checkpoints.shared_bytes() > kMostSharedBytes) return HCMEN_BAD_ARGUMENT;
  p.checkpoints.channel_blocks = ceil_div(group_channels, p.checkpoints.block_channels());
  const double blocks = (double)s.batch * (double)s.group;
  if (blocks * (double)p.checkpoints.channel_blocks > (double)kMostBlocks ||
      blocks * (double)p.channel_blocks > (double)kMostBlocks) {
    return HCMEN_BAD_ARGUMENT;
  }
  *plan = p;
  return HCMEN_OK;
}

// The sums over the channels of a warp of kCount values per lane (a power of two), where the lanes of a channel's slice
// lie 32 / lanes apart. Halves are exchanged, so that of kCount values over as many channels each lane ends up with
// one. Afterwards this lane holds, in values[0 .. held), the totals of values number [first, first + held);
// `speaks` tells the one lane among those that hold the same.
struct Held {
  int first, held;
  bool speaks;
};

template <int kCount>
__device__ __forceinline__ Held sum_over_channels(float (&values)[kCount], int channels, int channel) {
  Held out{0, kCount, true};
  int apart = channels >> 1;
#pragma unroll
  for (int half = kCount / 2; half >= 1; half /= 2) {
    if (apart >= 1) {
      const bool upper = (channel & apart) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float sent = upper ? values[i] : values[i + half];
        const float kept = upper ? values[i + half] : values[i];
        values[i] = kept + __shfl_xor_sync(kAllLanes, sent, apart);
      }
      out.held = half;
      out.first += upper ? half : 0;
      apart >>= 1;
    }
  }
  out.speaks = apart < 1 || (channel & (2 * apart - 1)) == 0;
  for (; apart >= 1; apart >>= 1) values[0] += __shfl_xor_sync(kAllLanes, values[0], apart);
  return out;
}

template <int kStates>
__global__ void __launch_bounds__(4 * kWarp, 2) scan_backward_kernel(const BackwardArguments a) {
  const hcmen_scan& s = a.s;
  const hcmen_scan_grad& g = a.g;
  const float* const u_in = static_cast<const float*>(s.u);
  const float* const delta_in = static_cast<const float*>(s.delta);
  const float* const z_in = static_cast<const float*>(s.z);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_shift = 5 - a.lanes_shift;
  const int slice = lane >> warp_shift, in_warp = lane & ((1 << warp_shift) - 1);
  const int within = (warp << warp_shift) + in_warp;
  const int block_channels = a.warps << warp_shift;
  const int row = kStates << a.lanes_shift;  // of B or C: padded states
  const int series = kTile * block_channels;

  float* const tile_d = shared_memory();
  float* const tile_u = tile_d + series;
  float* const tile_s = tile_u + series;
  float* const sums_y = tile_s + series;
  float* const sums_through = sums_y + series;
  float* const sums_decayed = sums_through + series;
  float* const tile_B = sums_decayed + series;
  float* const tile_C = tile_B + kTile * row;
  float* const warp_parts = tile_C + kTile * row;  // [warps][kTile][2][row]

  const Place at = block_place(s, a.channel_blocks, block_channels, 1);
  const int64_t part = (int64_t)(blockIdx.x % a.channel_blocks) * s.batch * s.time * s.group * s.state;
  const bool own = within < at.count;
  const int64_t channel = at.channel + within;
  const int64_t tiles = (s.time + kTile - 1) / kTile;

  float rate[kStates], gradient[kStates], dA[kStates];
#pragma unroll
  for (int p = 0; p < kStates; ++p) {
    const int n = slice * kStates + p;
    rate[p] = gradient[p] = dA[p] = 0.0f;
    if (own && n < s.state) {
      rate[p] = s.A[channel * s.state + n] * step::kLog2e;
      if (g.dlast_state) gradient[p] = g.dlast_state[(at.batch * s.channel + channel) * s.state + n];
    }
  }
  // Of channel threadIdx.x % block_channels, over the steps that this thread finishes.
  float dD = 0.0f, dbias = 0.0f;
  const int my_channel = threadIdx.x & (block_channels - 1);

  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int64_t first = tile * kTile;
    const int steps = (int)(s.time - first < kTile ? s.time - first : kTile);
    for (int i = threadIdx.x; i < series; i += blockDim.x) {
      const int k = i / block_channels;
      float d = 0.0f, u = 0.0f, out = 0.0f;
      if (k < steps && my_channel < at.count) {
        const int64_t offset = series_offset(s, at, first + k) + my_channel;
        d = step::step_size(delta_in[offset], s.delta_bias[at.channel + my_channel], s.delta_softplus);
        u = u_in[offset];
        out = z_in ? g.dy[offset] * step::silu(z_in[offset]) : g.dy[offset];
      }
      tile_d[i] = d;
      tile_u[i] = u;
      tile_s[i] = out;
    }
    stage_projection<kStates, float>(s, at, s.B, first, steps, kTile, a.lanes_shift, kStates, tile_B);
    stage_projection<kStates, float>(s, at, s.C, first, steps, kTile, a.lanes_shift, kStates, tile_C);
    __syncthreads();

    float h[kTile + 1][kStates];
#pragma unroll
    for (int p = 0; p < kStates; ++p) {
      const int n = slice * kStates + p;
      const bool there = own && n < s.state;
      h[0][p] = there ? a.starts[((at.batch * tiles + tile) * s.state + n) * s.channel + channel] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      const float d = tile_d[k * block_channels + within], input = d * tile_u[k * block_channels + within];
      float B[kStates];
      load_slice(tile_B + k * row + slice * kStates, B);
#pragma unroll
      for (int p = 0; p < kStates; ++p) h[k + 1][p] = step::advance(h[k][p], d, rate[p], input, B[p]);
    }

#pragma unroll
    for (int k = kTile - 1; k >= 0; --k) {
      const int element = k * block_channels + within;
      const float d = tile_d[element], u = tile_u[element], out = tile_s[element];
      float B[kStates], C[kStates], values[2 * kStates];
      load_slice(tile_B + k * row + slice * kStates, B);
      load_slice(tile_C + k * row + slice * kStates, C);
      step::Sums sums{0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int p = 0; p < kStates; ++p) {
        step::retreat(h[k][p], h[k + 1][p], d, u, out, rate[p], B[p], C[p], gradient[p], dA[p], values[p],
                      values[kStates + p], sums);
      }
      for (int apart = 1 << warp_shift; apart < kWarp; apart <<= 1) {
        sums.y += __shfl_xor_sync(kAllLanes, sums.y, apart);
        sums.through += __shfl_xor_sync(kAllLanes, sums.through, apart);
        sums.decayed += __shfl_xor_sync(kAllLanes, sums.decayed, apart);
      }
      if (slice == 0) {
        sums_y[element] = sums.y;
        sums_through[element] = sums.through;
        sums_decayed[element] = sums.decayed;
      }
      const Held held = sum_over_channels(values, 1 << warp_shift, in_warp);
#pragma unroll
      for (int i = 0; i < 2 * kStates; ++i) {
        if (i >= held.held || !held.speaks) continue;
        const int number = held.first + i;
        const bool of_C = number >= kStates;
        const int n = slice * kStates + (of_C ? number - kStates : number);
        if (a.warps > 1) {
          warp_parts[((warp * kTile + k) * 2 + of_C) * row + n] = values[i];
        } else if (k < steps && n < s.state) {
          const int64_t offset = part + projection_offset(s, at, first + k) + n;
          (of_C ? a.parts_C : a.parts_B)[offset] = values[i];
        }
      }
    }
    __syncthreads();

    for (int i = threadIdx.x; i < series; i += blockDim.x) {
      const int k = i / block_channels;
      if (k >= steps || my_channel >= at.count) continue;
      const int64_t c = at.channel + my_channel;
      const int64_t offset = series_offset(s, at, first + k) + my_channel;
      const step::InputGradients in = step::input_gradients(
          {sums_y[i], sums_through[i], sums_decayed[i]}, tile_u[i], delta_in[offset], s.delta_bias[c], s.delta_softplus,
          s.D[c], z_in != nullptr, z_in ? z_in[offset] : 0.0f, g.dy[offset]);
      g.du[offset] = in.du;
      g.ddelta[offset] = in.ddelta;
      if (g.dz) g.dz[offset] = in.dz;
      dD = fmaf(tile_s[i], tile_u[i], dD);
      dbias += in.ddelta;
    }
    if (a.warps > 1) {
      const int count = 2 * kTile * row;
      for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const int n = i % row, k = i / row / 2;
        if (k >= steps || n >= s.state) continue;
        float sum = 0.0f;
        for (int w = 0; w < a.warps; ++w) sum += warp_parts[w * count + i];
        const int64_t offset = part + projection_offset(s, at, first + k) + n;
        (i / row % 2 ? a.parts_C : a.parts_B)[offset] = sum;
      }
    }
  }

  float* const parts = a.parts_parameters + at.batch * (s.state + 2) * s.channel;
#pragma unroll
  for (int p = 0; p < kStates; ++p) {
    const int n = slice * kStates + p;
    if (own && n < s.state) {
      parts[n * s.channel + channel] = dA[p];
      if (g.dinitial_state) g.dinitial_state[(at.batch * s.channel + channel) * s.state + n] = gradient[p];
    }
  }
  // Threads of one channel lie block_channels apart; the first adds them up in order.
  __syncthreads();
  float* const thread_D = shared_memory();
  float* const thread_bias = thread_D + blockDim.x;
  thread_D[threadIdx.x] = dD;
  thread_bias[threadIdx.x] = dbias;
  __syncthreads();
  if ((int)threadIdx.x < at.count) {
    for (int i = threadIdx.x + block_channels; i < (int)blockDim.x; i += block_channels) {
      dD += thread_D[i];
      dbias += thread_bias[i];
    }
    parts[s.state * s.channel + at.channel + threadIdx.x] = dD;
    parts[(s.state + 1) * s.channel + at.channel + threadIdx.x] = dbias;
  }
}

int64_t backward_floats(const hcmen_scan& s, const BackwardPlan& plan) {
  const int64_t projections = s.batch * s.time * s.group * s.state;
  return rounded(s.batch * plan.tiles * s.state * s.channel) +
         (plan.channel_blocks > 1 ? 2 * rounded(plan.channel_blocks * projections) : 0) +
         rounded(s.batch * (s.state + 2) * s.channel);
}

int backward(const hcmen_scan& s, const hcmen_scan_grad& g, const BackwardPlan& plan, const hcmen_cuda_launch& with) {
  const int64_t projections = s.batch * s.time * s.group * s.state;
  float* const starts = static_cast<float*>(with.workspace);
  float* next = starts + rounded(s.batch * plan.tiles * s.state * s.channel);
  BackwardArguments a{};
  a.s = s;
  a.g = g;
  a.lanes_shift = plan.lanes_shift;
  a.warps = plan.warps;
  a.channel_blocks = plan.channel_blocks;
  a.starts = starts;
  a.parts_B = g.dB;
  a.parts_C = g.dC;
  if (plan.channel_blocks > 1) {
    a.parts_B = next;
    a.parts_C = a.parts_B + rounded(plan.channel_blocks * projections);
    next = a.parts_C + rounded(plan.channel_blocks * projections);
  }
  a.parts_parameters = next;

  ForwardArguments checkpoints{};
  checkpoints.s = s;
  checkpoints.plan = plan.checkpoints;
  checkpoints.s.z = nullptr;
  checkpoints.s.y = nullptr;
  checkpoints.four = four_at_once(checkpoints.s, plan.checkpoints);
  checkpoints.starts = starts;
  if (const int status = launch_forward<float, kCheckpoints>(checkpoints, 1, with.stream)) return status;

  const int64_t blocks = s.batch * s.group * plan.channel_blocks;
  const int threads = plan.warps * kWarp;
  const auto kernel = plan.states == 4 ? scan_backward_kernel<4> : scan_backward_kernel<8>;
  if (const int status = launch(kernel, blocks, threads, plan.shared_bytes(), with.stream, a)) return status;

  if (plan.channel_blocks > 1) {
    if (const int status = sum_parts({a.parts_B, plan.channel_blocks, projections, projections, 0, g.dB}, with.stream)) {
      return status;
    }
    if (const int status = sum_parts({a.parts_C, plan.channel_blocks, projections, projections, 0, g.dC}, with.stream)) {
      return status;
    }
  }
  const int64_t stride = (s.state + 2) * s.channel;
  const float* const parts = a.parts_parameters;
  if (const int status = sum_parts({parts, s.batch, stride, s.state * s.channel, s.channel, g.dA}, with.stream)) {
    return status;
  }
  if (const int status =
          sum_parts({parts + s.state * s.channel, s.batch, stride, s.channel, 0, g.dD}, with.stream)) {
    return status;
  }
  return sum_parts({parts + (s.state + 1) * s.channel, s.batch, stride, s.channel, 0, g.ddelta_bias}, with.stream);
}

int check_workspace(const hcmen_cuda_launch& with, int64_t floats) {
  if (floats == 0) return HCMEN_OK;
  if (with.workspace_bytes < floats * (int64_t)sizeof(float)) return HCMEN_SMALL_WORKSPACE;
  return with.workspace && aligned(with.workspace, 16) ? HCMEN_OK : HCMEN_BAD_ARGUMENT;
}

int check_inputs(const hcmen_scan& s) {
  return s.u && s.delta && s.A && s.B && s.C && s.D && s.delta_bias ? HCMEN_OK : HCMEN_BAD_ARGUMENT;
}

}  // namespace
}  // namespace cuda
}  // namespace hcmen

extern "C" {

HCMEN_API int hcmen_cuda_selective_scan_workspace(const hcmen_scan* scan, const hcmen_cuda_launch* launch,
                                                  int backward, int64_t* bytes) {
  using namespace hcmen::cuda;
  if (!scan || !bytes) return HCMEN_BAD_ARGUMENT;
  if (const int status = check_sizes(*scan, backward ? HCMEN_CUDA_BACKWARD_STATES : HCMEN_CUDA_FORWARD_STATES)) {
    return status;
  }
  int64_t floats = 0;
  if (backward) {
    BackwardPlan plan;
    if (const int status = plan_backward(*scan, &plan)) return status;
    floats = backward_floats(*scan, plan);
  } else {
    Layout plan;
    if (const int status = plan_forward(*scan, launch, &plan)) return status;
    floats = forward_floats(*scan, plan);
  }
  *bytes = floats * (int64_t)sizeof(float);
  return HCMEN_OK;
}

HCMEN_API int hcmen_cuda_selective_scan_plan(const hcmen_scan* scan, const hcmen_cuda_launch* launch,
                                             hcmen_cuda_plan* plan) {
  using namespace hcmen::cuda;
  if (!scan || !plan) return HCMEN_BAD_ARGUMENT;
  if (const int status = check_sizes(*scan, HCMEN_CUDA_FORWARD_STATES)) return status;
  Layout p;
  if (const int status = plan_forward(*scan, launch, &p)) return status;
  *plan = {p.chunk,
           p.chunks,
           scan->batch * scan->group * p.channel_blocks * p.chunks,
           p.lanes(),
           p.states,
           p.time_warps,
           1 << p.channel_warps_shift,
           p.steps,
           (int32_t)p.shared_bytes()};
  return HCMEN_OK;
}

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

HCMEN_API int hcmen_cuda_selective_scan_backward(const hcmen_scan* scan, const hcmen_scan_grad* grad,
                                                 const hcmen_cuda_launch* launch) {
  using namespace hcmen::cuda;
  if (!scan || !grad || !launch) return HCMEN_BAD_ARGUMENT;
  if (const int status = check_sizes(*scan, HCMEN_CUDA_BACKWARD_STATES)) return status;
  if (const int status = check_inputs(*scan)) return status;
  const hcmen_scan_grad& g = *grad;
  if (scan->dtype != HCMEN_FLOAT32) return HCMEN_BAD_ARGUMENT;
  if (!g.dy || !g.du || !g.ddelta || !g.dA || !g.dB || !g.dC || !g.dD || !g.ddelta_bias) return HCMEN_BAD_ARGUMENT;
  if ((g.dz == nullptr) != (scan->z == nullptr)) return HCMEN_BAD_ARGUMENT;
  BackwardPlan plan;
  if (const int status = plan_backward(*scan, &plan)) return status;
  if (const int status = check_workspace(*launch, backward_floats(*scan, plan))) return status;
  return backward(*scan, g, plan, *launch);
}

}  // extern "C"
