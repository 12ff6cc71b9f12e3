// How the backward state space dual lies over the warps of a block, and what all its kernels do with a tile of steps.
// Included by state_space_dual_backward.cu alone.
#ifndef HCMEN_STATE_SPACE_DUAL_BACKWARD_H_
#define HCMEN_STATE_SPACE_DUAL_BACKWARD_H_

#include "state_space_dual_cuda.h"

namespace hcmen {
namespace cuda {
namespace {

constexpr int kSide = 4;  // rows, and states, of a lane
constexpr int kRows = kDualWarpRows, kStates = kDualWarpStates;
constexpr int kCells = kRows * kStates;  // as [row of a lane][lane][state of a lane]
constexpr int kSub = 4;                  // steps that a warp goes back over together
constexpr int kTile = kDualTile;
static_assert(kTile == 2 * kSub, "");
constexpr int kMostWarps = 16;  // of a block

struct Arguments {
  hcmen_dual s;       // of a portion
  hcmen_dual_grad g;  // of a portion
  int row_warps_shift, row_warps, state_warps, row_blocks, columns, tiles, chunk_tiles, chunks;
  float* starts;  // [batch, tiles, columns, kCells]
  // With several chunks.
  float* before;  // [batch, tiles, head]: sums of step sizes of a chunk before each of its tiles
  float* sums;    // [batch, chunks, head]: sums of step sizes of a chunk
  float* ends;    // [batch, chunks, columns, kCells]: ends of chunks, then the states that they start from
  float* slopes;  // [batch, chunks, columns, kCells]: gradients that chunks make, then those that they are given
  float* parts_B;  // [head of the group, row_blocks, batch, time, group, state], or dB itself where there is one
  float* parts_C;
  float* parts_dt;          // [row_blocks, batch, time, head], or ddt itself
  float* parts_parameters;  // [batch, chunks, head, row_blocks, parameters()]

  // Gradients of A and dt_bias that a block has, then of D: of each row, or the first of each warp's for all.
  HCMEN_HD int parameters() const { return 2 + kRows * row_warps; }
  HCMEN_HD int rows() const { return kRows * row_warps; }
  HCMEN_HD int warps() const { return row_warps * state_warps; }
};

// --- shared memory --------------------------------------------------------------------------------------------------

// Rows of a tile: x, the gradient of the output before the gate, the gradient of z but for the output.
enum { kX, kS, kGate, kSeries };

// Where the arrays of a block lie, in floats. What a warp reads and writes lies at known distances.
struct Memory {
  static constexpr int kSeriesSize = kSeries * kTile * kWarp, kProjectionSize = kTile * kWarp, kPartSize = kSub * kWarp;
  // Of a warp: parts of y, of g B, both as [kSub][row]; of dB and dC, as [kSub][B, C][kStates]; of the gradient of the
  // step size, [kTile]; its rows' gradient of D.
  enum { kOutputs, kThrough = kPartSize, kProjections = 2 * kPartSize, kKept = 3 * kPartSize, kD = kKept + kTile };
  static constexpr int kPartsSize = kD + kWarp;
  int projections;  // behind [row_warps][kSeries][kTile][kWarp]: [state_warps][kTile][B, C][kStates]
  int parts;        // [warps()][kPartsSize]
  int steps;        // [2][kTile][4]: step size, decay and slope, by turns of tiles
  int dots;         // [row_warps][kTile]: parts of the gradient of the step size, over rows
  int parameters;   // [2][kSub]: gradients of A and dt_bias so far
  int spot;         // eight integers: see Spot
  int end;

  HCMEN_HD explicit Memory(const Arguments& a) {
    projections = a.row_warps * kSeriesSize;
    parts = projections + a.state_warps * kProjectionSize;
    steps = parts + a.warps() * kPartsSize;
    dots = steps + 2 * kTile * 4;
    parameters = dots + a.row_warps * kTile;
    spot = parameters + 2 * kSub;
    end = spot + 8;
  }
};

// --- places ---------------------------------------------------------------------------------------------------------

// The place of a warp in the arrays, and of its lane. What is a block's alone lies in shared memory.
struct Spot {
  int batch, chunk, head, row_block, group;
  int part;  // number of the block's parts of dB and dC
  int lane, warp, row_warp, state_warp, slice, quad;
  int first_row, first_state;  // of the warp; of the lane
  int64_t column;              // number of the warp, among those that a sequence takes

  __device__ __forceinline__ int64_t tile_number(const Arguments& a, int tile) const {
    return ((int64_t)batch * a.tiles + tile) * a.columns + column;
  }
  __device__ __forceinline__ int64_t chunk_number(const Arguments& a) const {
    return ((int64_t)batch * a.chunks + chunk) * a.columns + column;
  }
  __device__ __forceinline__ int cell() const { return lane * kSide; }
  // Whether the lane's row number j and state number i exist.
  __device__ __forceinline__ bool there(const hcmen_dual& s, int j, int i) const {
    return first_row + quad * kSide + j < s.head_dim && first_state + i < s.state;
  }
  // Where that state lies in [batch, head, head_dim, state].
  __device__ __forceinline__ int64_t state(const hcmen_dual& s, int j, int i) const {
    const int64_t row = ((int64_t)batch * s.head + head) * s.head_dim + first_row + quad * kSide + j;
    return row * s.state + first_state + i;
  }
};

// Puts what a block's spots share into shared memory.
__device__ __forceinline__ void begin_spots(const Arguments& a) {
  if (threadIdx.x == 0) {
    int* const to = reinterpret_cast<int*>(shared_memory() + Memory(a).spot);
    unsigned index = blockIdx.x;
    const unsigned row_block = index % (unsigned)a.row_blocks;
    index /= (unsigned)a.row_blocks;
    const unsigned head = index % (unsigned)a.s.head, heads = (unsigned)a.s.head / (unsigned)a.s.group;
    index /= (unsigned)a.s.head;
    to[0] = index / (unsigned)a.chunks;
    to[1] = index % (unsigned)a.chunks;
    to[2] = head;
    to[3] = row_block;
    to[4] = head / heads;
    to[5] = head % heads * a.row_blocks + row_block;
  }
  __syncthreads();
}

// Computed anew by every call, so that no part of it takes a register from here to there.
__device__ __forceinline__ Spot find_spot(const Arguments& a) {
  Spot p;
  const int thread = anew((int)threadIdx.x);
  const int* const from = reinterpret_cast<const int*>(shared_memory() + Memory(a).spot);
  p.batch = from[0];
  p.chunk = from[1];
  p.head = from[2];
  p.row_block = from[3];
  p.group = from[4];
  p.part = from[5];
  p.lane = thread % kWarp;
  p.warp = thread / kWarp;
  p.state_warp = p.warp >> a.row_warps_shift;
  p.row_warp = p.warp - (p.state_warp << a.row_warps_shift);
  p.slice = p.lane % kSide;
  p.quad = p.lane / kSide;
  p.first_row = ((p.row_block << a.row_warps_shift) + p.row_warp) * kRows;
  p.first_state = p.state_warp * kStates + p.slice * kSide;
  p.column = ((int64_t)p.head * a.row_blocks + p.row_block) * a.warps() + p.warp;
  return p;
}

// The step scanned as number `index`, counted over all sequences.
__device__ __forceinline__ int64_t row_of(const hcmen_dual& s, const Spot& at, int64_t index) {
  return at.batch * s.time + step::place(index, s.time, s.reverse);
}
// The group's first state in B and C, at such a row.
__device__ __forceinline__ int64_t projection_of(const hcmen_dual& s, const Spot& at, int64_t row) {
  return (row * s.group + at.group) * s.state;
}

using Cells = float[kSide][kSide];

__device__ __forceinline__ void clear(Cells& cells) {
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
#pragma unroll
    for (int i = 0; i < kSide; ++i) cells[j][i] = 0.0f;
  }
}

__device__ __forceinline__ void load_cells(const float* from, Cells& to) {
#pragma unroll
  for (int j = 0; j < kSide; ++j) load(from + j * kWarp * kSide, to[j]);
}

__device__ __forceinline__ void store_cells(const Cells& from, float* to) {
#pragma unroll
  for (int j = 0; j < kSide; ++j) store(from[j], to + j * kWarp * kSide);
}

__device__ __forceinline__ void copy_cells(const Cells& from, Cells& to) {
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
#pragma unroll
    for (int i = 0; i < kSide; ++i) to[j][i] = from[j][i];
  }
}

// States, or gradients of them, as the caller has them: [batch, head, head_dim, state], or null for zeros.
__device__ __forceinline__ void load_states(const hcmen_dual& s, const Spot& at, const float* from, Cells& to) {
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
#pragma unroll
    for (int i = 0; i < kSide; ++i) to[j][i] = from && at.there(s, j, i) ? from[at.state(s, j, i)] : 0.0f;
  }
}

// A tile of `steps` steps into shared memory: x, B and, if kAll, the rest. `turn` tells which of the two arrays of step
// sizes is the tile's.
template <bool kAll>
__device__ __forceinline__ void stage_tile(const Arguments& a, int tile, int steps, int turn) {
  const hcmen_dual& s = a.s;
  const Spot at = find_spot(a);
  const Memory where(a);
  float* const memory = shared_memory();
  const int64_t first = row_of(s, at, (int64_t)tile * kTile), way = s.reverse ? -1 : 1;
  const int row = at.first_row + at.lane;
#pragma unroll 1
  for (int k = at.state_warp; k < kTile; k += a.state_warps) {
    const bool live = k < steps && row < s.head_dim;
    const int64_t element = ((first + way * k) * s.head + at.head) * s.head_dim + row;
    float* const to = memory + at.row_warp * Memory::kSeriesSize + k * kWarp + at.lane;
    to[kX * kTile * kWarp] = live ? static_cast<const float*>(s.x)[element] : 0.0f;
    if (!kAll) continue;
    const float dy = live ? a.g.dy[element] : 0.0f;
    step::Gate gate{1.0f, 0.0f};
    if (s.z && live) gate = step::gate(static_cast<const float*>(s.z)[element]);
    to[kS * kTile * kWarp] = dy * gate.value;
    to[kGate * kTile * kWarp] = dy * gate.slope;
  }
  const bool second = at.lane >= kStates;
  const int n = at.state_warp * kStates + at.lane % kStates;
#pragma unroll 1
  for (int k = at.row_warp; k < kTile; k += a.row_warps) {
    const bool live = k < steps && n < s.state && (kAll || !second);
    const float* const from = static_cast<const float*>(second ? s.C : s.B) + projection_of(s, at, first + way * k) + n;
    memory[where.projections + at.state_warp * Memory::kProjectionSize + k * kWarp + at.lane] = live ? *from : 0.0f;
  }
  if (threadIdx.x < kTile) {
    const int k = threadIdx.x;
    step::StepSize d{0.0f, 0.0f};
    if (k < steps) {
      d = dual_step(s, static_cast<const float*>(s.dt)[(first + way * k) * s.head + at.head], s.dt_bias[at.head]);
    }
    float* const to = memory + where.steps + (turn * kTile + k) * 4;
    to[0] = d.size;
    to[1] = step::decay(d.size, s.A[at.head]);
    to[2] = d.slope;
  }
}

// What a lane reads of a tile in shared memory.
struct Tile {
  const float *series, *projection, *step;

  __device__ __forceinline__ Tile(const Arguments& a, int turn) {
    const Memory where(a);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, state_warp = warp >> a.row_warps_shift;
    series = shared_memory() + (warp - (state_warp << a.row_warps_shift)) * Memory::kSeriesSize + lane / kSide * kSide;
    projection = shared_memory() + where.projections + state_warp * Memory::kProjectionSize + lane % kSide * kSide;
    step = shared_memory() + where.steps + turn * kTile * 4;
  }
  __device__ __forceinline__ void values(int which, int k, float (&to)[kSide]) const {
    load(series + (which * kTile + k) * kWarp, to);
  }
  __device__ __forceinline__ void B(int k, float (&to)[kSide]) const { load(projection + k * kWarp, to); }
  __device__ __forceinline__ void C(int k, float (&to)[kSide]) const { load(projection + k * kWarp + kStates, to); }
};

// `x`, of which the compiler knows nothing until `value` is computed: what depends on it is not read before, where it
// would take registers.
__device__ __forceinline__ int anew_after(float value, int x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x) : "f"(value));
#else
  (void)value;
#endif
  return x;
}

// The states after step k of a tile from those before it. Returns the decay.
__device__ __forceinline__ float advance_cells(const Tile& tile, int k, Cells& h) {
  float input[kSide], B[kSide], step[4];
  tile.values(kX, k, input);
  tile.B(k, B);
  load(tile.step + k * 4, step);
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
    input[j] *= step[0];
#pragma unroll
    for (int i = 0; i < kSide; ++i) h[j][i] = fmaf(step[1], h[j][i], input[j] * B[i]);
  }
  return step[1];
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(kAllLanes, value, apart);
  return value;
}

}  // namespace
}  // namespace cuda
}  // namespace hcmen

#endif  // HCMEN_STATE_SPACE_DUAL_BACKWARD_H_
