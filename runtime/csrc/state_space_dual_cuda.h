// What the kernels of the state space dual on a CUDA device share: how work is laid out over lanes, warps and blocks.
// Internal.
#ifndef HCMEN_STATE_SPACE_DUAL_CUDA_H_
#define HCMEN_STATE_SPACE_DUAL_CUDA_H_

#include "cuda_backward.h"
#include "scan_step.h"
#include "selective_scan_cuda.h"
#include "state_space_dual.h"

namespace hcmen {
namespace cuda {

// Rows of a head (elements of head_dim) that a lane of the forward pass takes together.
constexpr int kDualRows = 4;
constexpr int kMostDualWarps = 4;
// Floats between row groups in shared memory.
constexpr int kDualRowStride = kRound * kDualRows + 4;

// A block of the forward pass. `lanes` lanes share the states of kDualRows rows, a row group. The row groups of a group's
// heads lie one after the other; a head's last one may have fewer rows.
struct DualLayout {
  int lanes_shift;     // log2 of the lanes that share a row group
  int states;          // of a lane and row
  int warps_shift;     // log2 of the warps of a block
  int steps;           // of a tile; a multiple of kRound
  int head_groups;     // row groups of a head
  int block_heads;     // heads that have row groups of one block, at most
  int64_t row_blocks;  // blocks of a group of heads
  int64_t chunk;       // steps
  int64_t chunks;

  HCMEN_HD int lanes() const { return 1 << lanes_shift; }
  HCMEN_HD int threads() const { return kWarp << warps_shift; }
  HCMEN_HD int block_groups_shift() const { return 5 + warps_shift - lanes_shift; }
  HCMEN_HD int block_groups() const { return 1 << block_groups_shift(); }

  // Shared memory, in floats: of a tile, and as much for the next one. By rounds; within a round
  //   B and C    [lane of a row group][step][B, C][state of the lane]
  //   x          [row group][step][row]
  //   decays     [head of the block][step][step size, decay]
  // so that all that a lane reads of a round lies at known distances. What lanes are apart keeps them off each other's
  // banks.
  HCMEN_HD int lane_stride() const { return 2 * kRound * states + 4; }
  HCMEN_HD int projections() const { return lane_stride() << lanes_shift; }
  HCMEN_HD int inputs() const { return kDualRowStride << block_groups_shift(); }
  HCMEN_HD int decays() const { return 2 * kRound * block_heads; }
  // Before the first tile: the group of the block, its first head, and of each row group where it lies and how many rows
  // it has. A multiple of four, as all of these, so that what follows can be read four at a time.
  HCMEN_HD int table() const { return 4 + (2 * block_groups() + 3) / 4 * 4; }
  HCMEN_HD int rounds() const { return steps / kRound; }
  HCMEN_HD int buffer() const { return rounds() * (projections() + inputs() + decays()); }
  int64_t shared_bytes() const { return (int64_t)sizeof(float) * (table() + 2 * buffer()); }
};

// Whether the kernels take sizes, type and limits of `s`, of at most `most_states` states.
int check_sizes(const hcmen_dual& s, int64_t most_states);

// How a forward pass is shared out; `wish` may be null.
int plan_forward(const hcmen_dual& s, const hcmen_cuda_launch* wish, DualLayout* plan);

// Floats of workspace that a forward plan of several chunks needs; 0 for a plan of one.
int64_t forward_floats(const hcmen_dual& s, const DualLayout& plan);

// --- the backward pass ----------------------------------------------------------------------------------------------

constexpr int kDualWarpRows = 32, kDualWarpStates = 16;  // of a warp
constexpr int kDualTile = 8;                             // steps of a tile, before which the states are kept

struct DualBackwardPlan : BackwardCut {
  int row_warps, state_warps;   // of a block
  int64_t row_blocks, columns;  // of a head; warps that a sequence takes
};

// `wish` may be null.
int plan_backward(const hcmen_dual& s, const hcmen_cuda_launch* wish, DualBackwardPlan* plan);

// Where the arrays of the workspace begin, in floats, and where it ends.
struct DualWorkspace {
  int64_t parameters, starts, before, sums, ends, slopes, B, C, dt, end;
};

DualWorkspace share_out(const hcmen_dual& s, const DualBackwardPlan& p);

// How many parts of dB and dC there are: of the heads of a group, and of the blocks of a head.
inline int64_t projection_parts(const hcmen_dual& s, const DualBackwardPlan& p) { return s.head / s.group * p.row_blocks; }

// `s` and `g` from sequence number `first` on, `count` of them.
hcmen_dual portion_of(const hcmen_dual& s, int64_t first, int64_t count);
hcmen_dual_grad portion_of(const hcmen_dual& s, const hcmen_dual_grad& g, int64_t first);

// --- both -----------------------------------------------------------------------------------------------------------

inline int check_inputs(const hcmen_dual& s) {
  return s.x && s.dt && s.A && s.B && s.C && s.D && s.dt_bias ? HCMEN_OK : HCMEN_BAD_ARGUMENT;
}

// The step size of a head from what the model gives, and its slope by that.
__device__ __forceinline__ step::StepSize dual_step(const hcmen_dual& s, float dt, float bias) {
  step::StepSize d = step::step_size_and_slope(dt, bias, s.delta_softplus);
  if (d.size < s.dt_min || d.size > s.dt_max) d.slope = 0.0f;
  d.size = step::limited(d.size, s.dt_min, s.dt_max);
  return d;
}

}  // namespace cuda
}  // namespace hcmen

#endif  // HCMEN_STATE_SPACE_DUAL_CUDA_H_
