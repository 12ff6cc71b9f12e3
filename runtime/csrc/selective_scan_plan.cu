// How a forward scan is shared out over a CUDA device, and the C functions that tell.
#include <algorithm>

#include "selective_scan_cuda.h"

namespace hcmen {
namespace cuda {

// Kernels exist for one lane, for two of eight states, and for four or more.
int states_per_lane(int64_t state, int lanes) {
  const int64_t needed = ceil_div(state, lanes);
  for (int states : {4, 8, 12, 16}) {
    const bool exists = lanes == 1 || states == 8 || (lanes > 2 && states != 12);
    if (exists && states >= needed) return states;
  }
  return 0;
}

int check_sizes(const hcmen_scan& s, int64_t most_states) {
  if (!all_positive({s.batch, s.time, s.channel, s.state, s.group})) return HCMEN_BAD_ARGUMENT;
  // A round's steps lie within 32 bits of each other, in bytes.
  constexpr int64_t kMostChannels = 1 << 28;
  if (s.channel % s.group != 0 || s.state > most_states || s.channel > kMostChannels || s.time > INT32_MAX) {
    return HCMEN_BAD_ARGUMENT;
  }
  if (s.dtype != HCMEN_FLOAT32 && s.dtype != HCMEN_FLOAT16) return HCMEN_BAD_ARGUMENT;
  // Every array, and every part of a workspace, holds fewer elements than one of these.
  if (!addressable({s.batch, s.time, s.channel, s.state}) || !addressable({s.batch, s.time, s.channel, 2}) ||
      !addressable({s.batch, s.channel, s.state + 2}) ||
      !addressable({s.batch, s.time, s.group, s.state, s.channel / s.group, 2})) {
    return HCMEN_BAD_ARGUMENT;
  }
  return HCMEN_OK;
}

namespace {

// The rule, by sizes alone, so that results are the same on every device. An H200 has 528 schedulers, each of which
// issues one instruction of one of its warps a clock. A step of a warp costs about 150 instructions with one lane of 16
// states to a channel, 90 with two of 8, 60 with four of 4: fewer lanes are less work, more lanes more warps.
//
//   enough warps                  one lane (or as few as hold the states), the whole sequence in one block
//   fewer, enough with two lanes  two lanes, since cutting time costs nine tenths of the work once more
//   a short sequence              four lanes, and its steps over the warps of a block: one launch
//   a long one                    one lane, time cut into chunks over blocks: three launches
//
// How many are enough with two lanes was measured on an H200, batch 16, 384 to 1536 channels: cut, 512 channels take
// 0.46 of the time at 4096 steps, 0.58 at 500, 0.87 at 200; 1024 take 0.82 and 0.91, and 1.21 at 200; 1536 more always.
// Chunks above 256 steps never won.
constexpr int64_t kEnoughWarps = 1024;
constexpr int64_t kShort = kMostTimeWarps * kRound;
constexpr int64_t kWarpsOfChunks = 2048;
constexpr int64_t kLeastChunk = 16, kMostChunk = 256;

int64_t enough_of_two_lanes(int64_t time) { return time <= kShort ? 512 : time <= 256 ? 640 : 1152; }

bool power_of_two(int64_t x) { return (x & (x - 1)) == 0; }

// Kernels with warps one after the other in time exist for four states of one lane, and for all with more lanes: those
// with more states of one lane need more registers than so many warps have, and more lanes are faster for few steps.
bool has_split_kernel(const Layout& p) { return p.lanes() > 1 || p.states == 4; }

int check_wish(const hcmen_cuda_launch& w) {
  const bool fine = w.lanes_per_channel >= 0 && w.lanes_per_channel <= kWarp && power_of_two(w.lanes_per_channel) &&
                    w.time_warps >= 0 && w.time_warps <= kMostTimeWarps && w.steps_per_chunk >= -1 &&
                    w.channel_warps >= 0 && w.channel_warps <= kMostChannelWarps && power_of_two(w.channel_warps) &&
                    w.steps_per_warp >= 0 && w.steps_per_warp <= 64 && w.steps_per_warp % kRound == 0;
  return fine ? HCMEN_OK : HCMEN_BAD_ARGUMENT;
}

// Steps of a tile for which every thread reads one vector of four states of B or C.
int tile_steps(const Layout& p) {
  const int fitting = (p.warps() * kWarp * 4) / (2 * p.lanes() * p.states);
  return fitting >= 16 ? 16 : fitting >= 8 ? 8 : kRound;
}

}  // namespace

int plan_forward(const hcmen_scan& s, const hcmen_cuda_launch* wish, Layout* plan) {
  const hcmen_cuda_launch none{};
  const hcmen_cuda_launch& wished = wish ? *wish : none;
  if (const int status = check_wish(wished)) return status;
  const int64_t group_channels = s.channel / s.group;

  // Warps if every channel had `lanes` lanes, one warp in time.
  const auto warps_with = [&](int lanes) { return s.batch * s.group * ceil_div(group_channels, kWarp / lanes); };
  int least = 1;
  while (states_per_lane(s.state, least) == 0) least *= 2;
  const auto few = [&](int lanes) {
    return warps_with(lanes) < (lanes == least ? kEnoughWarps : enough_of_two_lanes(s.time));
  };
  // The next number of lanes with fewer states each, or 0.
  const auto next = [&](int lanes) {
    for (int more = 2 * lanes; more <= kWarp; more *= 2) {
      if (states_per_lane(s.state, more) < states_per_lane(s.state, lanes)) return more;
    }
    return 0;
  };
  // Whether time is not to be cut over blocks.
  const bool whole = s.time <= kShort || wished.steps_per_chunk < 0;
  int lanes = least;
  if (wished.lanes_per_channel) {
    lanes = wished.lanes_per_channel;
  } else if (few(least) && next(least)) {
    if (!few(next(least))) {
      lanes = next(least);
    } else if (whole) {
      while (few(lanes) && next(lanes)) lanes = next(lanes);
    }
  }
  Layout p{};
  p.states = states_per_lane(s.state, lanes);
  if (p.states == 0) return HCMEN_BAD_ARGUMENT;
  p.lanes_shift = log2_of(lanes);
  const int64_t warps = warps_with(lanes);
  const bool spare = few(lanes);

  int64_t channel_warps = wished.channel_warps ? wished.channel_warps : kMostChannelWarps;
  while (channel_warps > 1 && (channel_warps / 2) * (kWarp / lanes) >= group_channels) channel_warps /= 2;
  p.channel_warps_shift = log2_of(channel_warps);

  // Either over the warps of a block or over blocks.
  p.time_warps = 1;
  const bool chunked = wished.steps_per_chunk > 0 && wished.steps_per_chunk < s.time;
  if (!chunked && has_split_kernel(p)) {
    const int64_t rounds = ceil_div(s.time, kRound);
    if (wished.time_warps) {
      p.time_warps = wished.time_warps;
    } else if (spare && whole) {
      p.time_warps = (int)(rounds < kMostTimeWarps ? rounds : kMostTimeWarps);
    }
  }
  if (p.time_warps > 1) {
    p.channel_warps_shift = 0;
    p.steps = kRound;
    while (p.time_warps > 1 && p.shared_bytes() > kMostSharedBytes) --p.time_warps;
  }
  if (p.time_warps == 1) {
    p.steps = wished.steps_per_warp ? wished.steps_per_warp : tile_steps(p);
    while (p.shared_bytes() > kMostSharedBytes && p.steps > kRound) p.steps -= kRound;
  }
  if (p.shared_bytes() > kMostSharedBytes) return HCMEN_BAD_ARGUMENT;
  p.channel_blocks = ceil_div(group_channels, p.block_channels());

  p.chunk = s.time;
  if (chunked) {
    p.chunk = wished.steps_per_chunk;
  } else if (wished.steps_per_chunk == 0 && p.time_warps == 1 && spare && !whole) {
    const int64_t chunks = ceil_div(kWarpsOfChunks, warps);
    // The states between chunks take no more memory than u.
    const int64_t least_chunk = s.state < kLeastChunk ? kLeastChunk : s.state;
    const int64_t most_chunk = least_chunk < kMostChunk ? kMostChunk : least_chunk;
    const int64_t fitting = std::clamp(ceil_div(s.time, chunks), least_chunk, most_chunk);
    p.chunk = ceil_div(fitting, kLeastChunk) * kLeastChunk;
  }
  p.chunks = ceil_div(s.time, p.chunk);
  const int64_t blocks = s.batch * s.group * p.channel_blocks;
  if (const int status = check_blocks((double)blocks * (double)p.chunks)) return status;
  *plan = p;
  return HCMEN_OK;
}

bool four_at_once(const hcmen_scan& s) {
  const int64_t bytes = 4 * (s.dtype == HCMEN_FLOAT16 ? 2 : 4);
  return s.state % 4 == 0 && aligned(s.B, bytes) && aligned(s.C, bytes) && aligned(s.A, 16) &&
         aligned(s.initial_state, 16) && aligned(s.last_state, 16);
}

int64_t forward_floats(const hcmen_scan& s, const Layout& plan) {
  return rounded(s.batch * (plan.chunks - 1) * s.state * s.channel) +
         rounded(s.batch * (plan.chunks - 1) * s.channel);
}

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

}  // extern "C"
