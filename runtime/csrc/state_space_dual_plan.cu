// How the state space dual is shared out over a CUDA device, and the C functions that tell.
#include <algorithm>

#include "state_space_dual_cuda.h"

namespace hcmen {
namespace cuda {

// Of a tile.
constexpr int kMostSteps = 64;

int check_sizes(const hcmen_dual& s, int64_t most_states) {
  if (!all_positive({s.batch, s.time, s.head, s.head_dim, s.state, s.group})) return HCMEN_BAD_ARGUMENT;
  // Elements of a tile lie within 32 bits of each other, and a tile has at most kMostSteps steps.
  constexpr int64_t kMost = INT32_MAX / kMostSteps;
  if (s.head % s.group != 0 || s.state > most_states || s.time > INT32_MAX || s.head > kMost || s.head_dim > kMost ||
      s.head * ceil_div(s.head_dim, kDualRows) * kDualRows > kMost || s.group * s.state > kMost) {
    return HCMEN_BAD_ARGUMENT;
  }
  if (s.dtype != HCMEN_FLOAT32 && s.dtype != HCMEN_FLOAT16) return HCMEN_BAD_ARGUMENT;
  if (!(s.dt_min <= s.dt_max)) return HCMEN_BAD_ARGUMENT;
  // Every array, and every part of a workspace, holds fewer elements than one of these.
  if (!addressable({s.batch, s.time, s.head, s.head_dim, s.state, 2}) ||
      !addressable({s.batch, s.time, s.head, s.head_dim + 31, s.state + 15, 2})) {
    return HCMEN_BAD_ARGUMENT;
  }
  return HCMEN_OK;
}

namespace {

// The rule, by sizes alone, so that results are the same on every device. It follows that of the selective scan
// (selective_scan_plan.cu), which was measured; this one was not. Eight states of a lane, of four rows each, are 96
// multiplications and additions a step. Four take nearly as many other instructions, and are more warps. Sixteen need so
// many registers that a multiprocessor holds eight warps: they are for more than 256 states alone.
//
//   enough warps                eight states of a lane, the whole sequence in one block
//   fewer, enough with four     four
//   a short sequence            likewise: one launch
//   a long one                  eight, time cut into chunks over blocks: three launches
constexpr int64_t kEnoughWarps = 1024;
constexpr int64_t kShort = 64;
constexpr int64_t kWarpsOfChunks = 2048;
constexpr int64_t kLeastChunk = 32, kMostChunk = 256;

// The least number of states that kernels exist for and that `lanes` lanes hold `state` with; 0 where none does.
int states_of_lane(int64_t state, int lanes) {
  for (int states : {4, 8, 16}) {
    if (states * lanes >= state) return states;
  }
  return 0;
}

int check_wish(const hcmen_cuda_launch& w) {
  const auto power = [](int64_t x, int64_t most) { return x >= 0 && x <= most && (x & (x - 1)) == 0; };
  const bool fine = power(w.lanes_per_channel, kWarp) && power(w.channel_warps, kMostDualWarps) && w.time_warps >= 0 &&
                    w.time_warps <= 1 && w.steps_per_chunk >= -1 && w.steps_per_warp >= 0 && w.steps_per_warp <= kMostSteps &&
                    w.steps_per_warp % kRound == 0;
  return fine ? HCMEN_OK : HCMEN_BAD_ARGUMENT;
}

}  // namespace

int plan_forward(const hcmen_dual& s, const hcmen_cuda_launch* wish, DualLayout* plan) {
  const hcmen_cuda_launch none{};
  const hcmen_cuda_launch& wished = wish ? *wish : none;
  if (const int status = check_wish(wished)) return status;
  DualLayout p{};
  p.head_groups = (int)ceil_div(s.head_dim, kDualRows);
  const int64_t groups = s.head / s.group * p.head_groups;  // row groups of a group of heads

  const auto warps_with = [&](int lanes) { return s.batch * s.group * ceil_div(groups, kWarp / lanes); };
  const auto few = [&](int lanes) { return warps_with(lanes) < kEnoughWarps; };
  // Twice as many lanes where that leaves fewer states of each, else 0.
  const auto next = [&](int lanes) {
    return lanes < kWarp && states_of_lane(s.state, 2 * lanes) < states_of_lane(s.state, lanes) ? 2 * lanes : 0;
  };
  int lanes = 1;
  while (lanes < kWarp && (states_of_lane(s.state, lanes) == 0 || states_of_lane(s.state, lanes) > 8)) lanes *= 2;
  if (wished.lanes_per_channel) {
    lanes = wished.lanes_per_channel;
  } else if (few(lanes)) {
    const bool whole = s.time <= kShort || wished.steps_per_chunk < 0;
    const int more = next(lanes) ? next(lanes) : lanes;
    if (whole || !few(more)) lanes = more;
  }
  p.states = states_of_lane(s.state, lanes);
  if (p.states == 0) return HCMEN_BAD_ARGUMENT;
  p.lanes_shift = log2_of(lanes);

  int warps = wished.channel_warps ? wished.channel_warps : kMostDualWarps;
  while (warps > 1 && (int64_t)warps / 2 * (kWarp / lanes) >= groups) warps /= 2;
  p.warps_shift = log2_of(warps);
  p.row_blocks = ceil_div(groups, p.block_groups());
  const int64_t spread = (p.block_groups() - 2 + p.head_groups) / p.head_groups + 1;
  p.block_heads = (int)std::min(spread, s.head / s.group);

  // As many steps as every thread has two vectors of B and C of, or fewer.
  p.steps = wished.steps_per_warp ? wished.steps_per_warp : 64 / p.states;
  while (p.shared_bytes() > kMostSharedBytes && p.steps > kRound) p.steps -= kRound;
  if (p.shared_bytes() > kMostSharedBytes) return HCMEN_BAD_ARGUMENT;

  p.chunk = s.time;
  if (wished.steps_per_chunk > 0) {
    p.chunk = std::min(wished.steps_per_chunk, s.time);
  } else if (wished.steps_per_chunk == 0 && s.time > kShort && few(lanes)) {
    const int64_t chunks = ceil_div(kWarpsOfChunks, warps_with(lanes));
    // The states between chunks take no more than twice the memory of x.
    const int64_t least = std::max(kLeastChunk, s.state / 2), most = std::max(kMostChunk, least);
    p.chunk = ceil_div(std::clamp(ceil_div(s.time, chunks), least, most), kLeastChunk) * kLeastChunk;
  }
  p.chunks = ceil_div(s.time, p.chunk);
  const double blocks = (double)s.batch * (double)s.group * (double)p.row_blocks * (double)p.chunks;
  if (const int status = check_blocks(blocks)) return status;
  *plan = p;
  return HCMEN_OK;
}

int64_t forward_floats(const hcmen_dual& s, const DualLayout& plan) {
  const int64_t starts = s.batch * (plan.chunks - 1) * s.head;
  return rounded(starts * s.head_dim * s.state) + rounded(starts);
}

// --- the backward pass ----------------------------------------------------------------------------------------------

namespace {

// Warps that a device shall have to do, where a sequence must be cut for it: two blocks of eight on each of 132
// multiprocessors.
constexpr int64_t kEnoughBackwardWarps = 132 * 16;

// Warps of a block, where the states are not too many for it.
constexpr int kWarps = 8;
constexpr int64_t kCells = kDualWarpRows * kDualWarpStates;  // of a warp

}  // namespace

int plan_backward(const hcmen_dual& s, const hcmen_cuda_launch* wish, DualBackwardPlan* plan) {
  DualBackwardPlan p{};
  p.state_warps = (int)ceil_div(s.state, kDualWarpStates);
  p.row_warps = 1;
  while (2 * p.row_warps * p.state_warps <= kWarps && p.row_warps * kDualWarpRows < s.head_dim) p.row_warps *= 2;
  p.row_blocks = ceil_div(s.head_dim, p.row_warps * kDualWarpRows);
  p.columns = s.head * p.row_blocks * p.row_warps * p.state_warps;
  if (const int status = cut_backward(s.batch, s.time, p.columns, kDualTile, kEnoughBackwardWarps, wish, &p)) return status;
  *plan = p;
  return HCMEN_OK;
}

DualWorkspace share_out(const hcmen_dual& s, const DualBackwardPlan& p) {
  DualWorkspace w{};
  int64_t next = 0;
  const auto take = [&](int64_t floats) {
    const int64_t at = next;
    next += rounded(floats);
    return at;
  };
  const int64_t warps = p.portion * p.columns, projections = p.portion * s.time * s.group * s.state;
  w.parameters = take(s.batch * p.chunks * s.head * p.row_blocks * (2 + kDualWarpRows * p.row_warps));
  w.starts = take(warps * p.tiles * kCells);
  if (p.chunks > 1) {
    w.before = take(p.portion * p.tiles * s.head);
    w.sums = take(p.portion * p.chunks * s.head);
    w.ends = take(warps * p.chunks * kCells);
    w.slopes = take(warps * p.chunks * kCells);
  }
  if (projection_parts(s, p) > 1) {
    w.B = take(projection_parts(s, p) * projections);
    w.C = take(projection_parts(s, p) * projections);
  }
  if (p.row_blocks > 1) w.dt = take(p.row_blocks * p.portion * s.time * s.head);
  w.end = next;
  return w;
}

hcmen_dual portion_of(const hcmen_dual& s, int64_t first, int64_t count) {
  hcmen_dual out = s;
  const auto ahead = [&](const void* from, int64_t of_one) -> const float* {
    return from ? static_cast<const float*>(from) + first * of_one : nullptr;
  };
  const int64_t series = s.time * s.head * s.head_dim, projections = s.time * s.group * s.state;
  out.batch = count;
  out.x = ahead(s.x, series);
  out.dt = ahead(s.dt, s.time * s.head);
  out.z = ahead(s.z, series);
  out.B = ahead(s.B, projections);
  out.C = ahead(s.C, projections);
  out.initial_state = ahead(s.initial_state, s.head * s.head_dim * s.state);
  out.y = nullptr;
  out.last_state = nullptr;
  return out;
}

hcmen_dual_grad portion_of(const hcmen_dual& s, const hcmen_dual_grad& g, int64_t first) {
  hcmen_dual_grad out = g;
  const int64_t series = first * s.time * s.head * s.head_dim, projections = first * s.time * s.group * s.state;
  const int64_t states = first * s.head * s.head_dim * s.state;
  out.dy = g.dy + series;
  out.dx = g.dx + series;
  out.ddt = g.ddt + first * s.time * s.head;
  out.dB = g.dB + projections;
  out.dC = g.dC + projections;
  if (g.dz) out.dz = g.dz + series;
  if (g.dlast_state) out.dlast_state = g.dlast_state + states;
  if (g.dinitial_state) out.dinitial_state = g.dinitial_state + states;
  return out;
}

}  // namespace cuda
}  // namespace hcmen

extern "C" {

HCMEN_API int hcmen_cuda_state_space_dual_workspace(const hcmen_dual* dual, const hcmen_cuda_launch* launch,
                                                    int backward, int64_t* bytes) {
  using namespace hcmen::cuda;
  if (!dual || !bytes) return HCMEN_BAD_ARGUMENT;
  if (const int status = check_sizes(*dual, backward ? HCMEN_CUDA_BACKWARD_STATES : HCMEN_CUDA_FORWARD_STATES)) {
    return status;
  }
  int64_t floats = 0;
  if (backward) {
    DualBackwardPlan plan;
    if (const int status = plan_backward(*dual, launch, &plan)) return status;
    floats = share_out(*dual, plan).end;
  } else {
    DualLayout plan;
    if (const int status = plan_forward(*dual, launch, &plan)) return status;
    floats = forward_floats(*dual, plan);
  }
  *bytes = floats * (int64_t)sizeof(float);
  return HCMEN_OK;
}

HCMEN_API int hcmen_cuda_state_space_dual_plan(const hcmen_dual* dual, const hcmen_cuda_launch* launch,
                                               hcmen_cuda_plan* plan) {
  using namespace hcmen::cuda;
  if (!dual || !plan) return HCMEN_BAD_ARGUMENT;
  if (const int status = check_sizes(*dual, HCMEN_CUDA_FORWARD_STATES)) return status;
  DualLayout p;
  if (const int status = plan_forward(*dual, launch, &p)) return status;
  *plan = {p.chunk,
           p.chunks,
           dual->batch * dual->group * p.row_blocks * p.chunks,
           p.lanes(),
           p.states,
           1,
           1 << p.warps_shift,
           p.steps,
           (int32_t)p.shared_bytes()};
  return HCMEN_OK;
}

}  // extern "C"
