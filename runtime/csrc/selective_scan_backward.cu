// The gradients of the selective scan on a CUDA device. The arithmetic is in scan_step.h; here it is shared out, as in
// selective_scan.cu.
//
// The backward pass keeps the states at the start of every tile (a first launch), then takes the tiles from the last to
// the first and recomputes their states in registers. Gradients of B and C are sums over channels: over the lanes of a
// warp by exchanging halves, over the warps of a block in shared memory, over blocks, as those of A, D and delta_bias
// over the batch, from partial sums in the workspace. Every sum has one order.
#include "selective_scan_cuda.h"

namespace hcmen {
namespace cuda {
namespace {

constexpr int kTile = kCheckpointSteps;  // steps whose states are recomputed in registers

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
  // The checkpoints: one chunk, one warp in time.
  hcmen_cuda_launch wish{};
  wish.steps_per_chunk = -1;
  wish.time_warps = 1;
  if (const int status = plan_forward(s, &wish, &p.checkpoints)) return status;
  const double blocks = (double)s.batch * (double)s.group;
  if (blocks * (double)p.channel_blocks > (double)kMostBlocks) return HCMEN_BAD_ARGUMENT;
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
  checkpoints.four = four_at_once(checkpoints.s);
  checkpoints.starts = starts;
  if (const int status = launch_checkpoints(checkpoints, with.stream)) return status;

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

}  // namespace

int load_backward_kernels() { return load_kernels(scan_backward_kernel<4>, scan_backward_kernel<8>); }

int backward_workspace(const hcmen_scan& s, int64_t* floats) {
  BackwardPlan plan;
  if (const int status = plan_backward(s, &plan)) return status;
  *floats = backward_floats(s, plan);
  return HCMEN_OK;
}

}  // namespace cuda
}  // namespace hcmen

extern "C" {

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
