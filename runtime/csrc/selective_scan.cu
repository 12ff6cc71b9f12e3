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
// The backward pass is in selective_scan_backward.cu.
//
// What lies past an end (of time, channels, states) is staged as zeros: a step of size zero leaves every state as it
// was, a state with B = C = 0 stays zero.
#include "selective_scan_cuda.h"

namespace hcmen {
namespace cuda {
namespace {

// Steps whose outputs are held in registers before they are written to shared memory, so that reads of the next step
// need not wait for writes.
constexpr int kStepsAtOnce = 4;

}  // namespace

// --- plans ----------------------------------------------------------------------------------------------------------

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

namespace {

enum Mode {
  kOutputs,      // y, and the last state
  kChunks,       // what a chunk makes of a zero state
  kCheckpoints,  // the states at the start of every tile
};

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

}  // namespace

bool four_at_once(const hcmen_scan& s, const Layout& plan) {
  const int64_t bytes = 4 * (s.dtype == HCMEN_FLOAT16 ? 2 : 4);
  return plan.block_channels() >= 4 && s.channel % 4 == 0 && s.channel / s.group % 4 == 0 && aligned(s.u, bytes) &&
         aligned(s.delta, bytes) && aligned(s.z, bytes) && aligned(s.y, bytes);
}

int launch_checkpoints(const ForwardArguments& a, void* stream) {
  return launch_forward<float, kCheckpoints>(a, 1, stream);
}

namespace {

int64_t forward_floats(const hcmen_scan& s, const Layout& plan) {
  return rounded(s.batch * (plan.chunks - 1) * s.state * s.channel) +
         rounded(s.batch * (plan.chunks - 1) * s.channel);
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
    if (const int status = backward_workspace(*scan, launch, &floats)) return status;
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

}  // extern "C"
