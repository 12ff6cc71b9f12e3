// What the forward and the backward scan on a CUDA device share: how work is laid out over lanes, warps and blocks.
// Internal.
#ifndef HCMEN_SELECTIVE_SCAN_CUDA_H_
#define HCMEN_SELECTIVE_SCAN_CUDA_H_

#include "cuda_launch.h"
#include "scan_step.h"

namespace hcmen {
namespace cuda {

// Steps that a warp of the forward scan takes together.
constexpr int kRound = 4;
// Warps of a block of the forward scan side by side over channels, and one after the other in time, at most.
constexpr int kMostChannelWarps = 4;
constexpr int kMostTimeWarps = 16;

// Floats between the states of neighbouring lanes in shared memory: lanes read four at a time, and these strides keep
// them off each other's banks.
__host__ __device__ constexpr int slice_stride(int states) { return states == 8 ? 12 : states == 16 ? 20 : states; }

// --- plans ----------------------------------------------------------------------------------------------------------

// A block of the forward scan. With one time warp it takes `steps` at a time; with more, each of them takes kRound.
struct Layout {
  int lanes_shift;          // log2 of the lanes that share a channel
  int states;               // of a lane
  int channel_warps_shift;  // log2
  int time_warps;
  int steps;                // of a warp in a tile; a multiple of kRound
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

  // Shared memory, in floats: B and C of a tile, with one time warp also those of the next; ends and decays of the time
  // warps.
  HCMEN_HD int projections() const { return tile() * 2 * row(); }
  HCMEN_HD int exchange() const { return time_warps == 1 ? 0 : time_warps * 2 * states * kWarp; }
  int64_t shared_bytes() const {
    return (int64_t)sizeof(float) * ((time_warps == 1 ? 2 : 1) * (int64_t)projections() + exchange());
  }
};

inline int log2_of(int64_t power) {
  int shift = 0;
  while ((int64_t)1 << shift < power) ++shift;
  return shift;
}

// The least number of states per lane that forward kernels exist for; 0 where no kernel holds them.
int states_per_lane(int64_t state, int lanes);

// Whether the kernels take sizes and type of a scan of at most `most_states` states.
int check_sizes(const hcmen_scan& s, int64_t most_states);

// How a forward scan is shared out; `wish` may be null.
int plan_forward(const hcmen_scan& s, const hcmen_cuda_launch* wish, Layout* plan);

// Floats of the workspace, rounded up so that the next array is aligned too.
inline int64_t rounded(int64_t floats) { return ceil_div(floats, 4) * 4; }

// Whether states and addresses of A, B, C and of the states allow loads of four elements at once.
bool four_at_once(const hcmen_scan& s);

// Floats of workspace that the backward scan of `s` takes; `wish` may be null.
int backward_workspace(const hcmen_scan& s, const hcmen_cuda_launch* wish, int64_t* floats);

inline int check_workspace(const hcmen_cuda_launch& with, int64_t floats) {
  if (floats == 0) return HCMEN_OK;
  if (with.workspace_bytes < floats * (int64_t)sizeof(float)) return HCMEN_SMALL_WORKSPACE;
  return with.workspace && aligned(with.workspace, 16) ? HCMEN_OK : HCMEN_BAD_ARGUMENT;
}

inline int check_inputs(const hcmen_scan& s) {
  return s.u && s.delta && s.A && s.B && s.C && s.D && s.delta_bias ? HCMEN_OK : HCMEN_BAD_ARGUMENT;
}

// --- blocks ---------------------------------------------------------------------------------------------------------

struct ForwardArguments {
  hcmen_scan s;
  Layout plan;
  bool four;      // four_at_once
  float* ends;    // [batch, chunks - 1, state, channel]
  float* sums;    // [batch, chunks - 1, channel]
};

// `x`, of which the compiler knows nothing: what follows from it is not kept in registers for a later use of the same.
__device__ __forceinline__ int anew(int x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// The same, where a register too few would go to local memory. It costs a kernel at most 1.3 % more instructions, and
// saves some as many. sm_90 has enough registers: its code stays as it was measured.
__device__ __forceinline__ int anew_but_on_90(int x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  return x;
#else
  return anew(x);
#endif
}

// The place of a block in the arrays.
struct Place {
  int64_t batch, chunk, channel;  // the first channel of the block
  int group, count;               // channels of the block that exist
};

__device__ __forceinline__ Place block_place(const hcmen_scan& s, int64_t channel_blocks, int block_channels,
                                             int64_t chunks) {
  // A grid has fewer than 2^31 blocks, and a division of 64 bits takes some hundred instructions.
  unsigned index = blockIdx.x;
  Place p;
  const unsigned block = index % (unsigned)channel_blocks;
  const int64_t first = (int64_t)block * block_channels;
  index /= (unsigned)channel_blocks;
  const int64_t group_channels = s.group == 1 ? s.channel : (unsigned)s.channel / (unsigned)s.group;
  p.group = (int)(index % (unsigned)s.group);
  index /= (unsigned)s.group;
  p.chunk = index % (unsigned)chunks;
  p.batch = index / (unsigned)chunks;
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

// Floats that a plan of several chunks needs for `ends` and `sums`; 0 for a plan of one.
int64_t forward_floats(const hcmen_scan& s, const Layout& plan);

}  // namespace cuda
}  // namespace hcmen

#endif  // HCMEN_SELECTIVE_SCAN_CUDA_H_
