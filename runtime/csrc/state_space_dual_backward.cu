// The gradients of the state space dual on a CUDA device. With s the gradient of y before the gate, g that of the state
// after a step and p a row of a head:
//
//   g += s C^T;  dC = sum over p of s h;  dB = d sum over p of g x;  dx = D s + d (g B);  g of the step before = decay g
//   gradient of d = sum over p of x (g B)  +  A decay <g, h of the step before>
//
// A warp takes 32 rows and 16 states of one head. A lane holds four rows of four states each: lanes 4 q to 4 q + 3, a
// quad, share four rows, lane & 3 tells which states. A block holds all states of its rows, `state_warps` warps of them,
// and `row_warps` times 32 rows. What a head has once at each step is computed once in a block.
//
// Steps are taken in tiles of kTile, and tiles in chunks, one chunk to a block, by the launches of the selective scan
// (selective_scan_backward.cu):
//
//   ends     walks each chunk forward and keeps the states before every tile. Where there are several chunks it starts
//            from zero states, and finds besides what a chunk makes of them and which gradient its outputs alone give
//            the states before it
//   carries  where there are several chunks: walks over them, forward for the states that each starts from, backward
//            for the gradient of the states that it ends with
//   main     takes the tiles of a chunk from the last to the first. Of a tile it recomputes the states, kSub steps at a
//            time, in registers, and then goes back over these steps
//   sums     adds up: gradients of B and C over heads, that of dt over blocks of rows, those of A, D and dt_bias over
//            sequences and chunks. Every sum has one order
//
// Sequences are taken in portions that keep the workspace small. What lies past an end (of time, rows, states) is taken
// as zero, with a decay of one.
#include "state_space_dual_cuda.h"

namespace hcmen {
namespace cuda {
namespace {

constexpr int kSide = 4;                       // rows, and states, of a lane
constexpr int kRows = 32, kStates = 16;        // of a warp
constexpr int kCells = kRows * kStates;        // as [row of a lane][lane][state of a lane]
constexpr int kSub = 4;                        // steps whose states are in registers
constexpr int kTile = 2 * kSub;
constexpr int kMostWarps = 16, kWarps = 8;     // of a block: at most, and where the states are not too many for it

// --- plans ----------------------------------------------------------------------------------------------------------

// Warps that a device shall have to do, where a sequence must be cut for it: two blocks of eight on each of 132
// multiprocessors. How many times the states of a warp are kept at once, unless a single sequence needs more: 4 GiB.
constexpr int64_t kEnoughWarps = 132 * 16;
constexpr double kMostStarts = 1 << 21;

struct BackwardPlan {
  int row_warps, state_warps;   // of a block
  int64_t row_blocks, columns;  // of a head; warps that a sequence takes
  int64_t tiles, chunk_tiles, chunks;
  int64_t portion;  // sequences that are under way together
};

int plan_backward(const hcmen_dual& s, const hcmen_cuda_launch* wish, BackwardPlan* plan) {
  const int64_t wished = wish ? wish->steps_per_chunk : 0, at_once = wish ? wish->sequences_at_once : 0;
  if (wished < -1 || at_once < 0) return HCMEN_BAD_ARGUMENT;
  BackwardPlan p{};
  p.state_warps = (int)ceil_div(s.state, kStates);
  p.row_warps = 1;
  while (2 * p.row_warps * p.state_warps <= kWarps && p.row_warps * kRows < s.head_dim) p.row_warps *= 2;
  p.row_blocks = ceil_div(s.head_dim, p.row_warps * kRows);
  p.columns = s.head * p.row_blocks * p.row_warps * p.state_warps;
  p.tiles = ceil_div(s.time, kTile);
  const double warps = (double)s.batch * (double)p.columns, starts = (double)p.tiles * (double)p.columns;

  p.chunk_tiles = p.tiles;
  if (wished > 0) {
    p.chunk_tiles = wished < s.time ? ceil_div(wished, kTile) : p.tiles;
  } else if (wished == 0 && warps < (double)kEnoughWarps && p.tiles > 1) {
    // At once if a few chunks do, else in two turns, which waste less of the last.
    const int64_t have = (int64_t)warps;
    p.chunk_tiles = ceil_div(p.tiles, (4 * have <= kEnoughWarps ? 1 : 2) * kEnoughWarps / have);
  }
  p.chunks = ceil_div(p.tiles, p.chunk_tiles);

  // What a warp keeps is numbered in 32 bits, as blocks are; past these no device has the memory.
  if (const int status = check_blocks(starts > warps * (double)p.chunks ? starts : warps * (double)p.chunks)) return status;
  const double most = kMostStarts / starts;
  p.portion = most < 1.0 ? 1 : most > (double)s.batch ? s.batch : (int64_t)most;
  if (at_once > 0 && p.portion > at_once) p.portion = at_once;
  // Portions of equal size.
  p.portion = ceil_div(s.batch, ceil_div(s.batch, p.portion));
  *plan = p;
  return HCMEN_OK;
}

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
  enum { kOutputs, kThrough = kPartSize, kProjections = 2 * kPartSize, kKept = 3 * kPartSize, kD = kKept + kTile, kPartsSize = kD + kWarp };
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

// Of sums over the lanes of a quad of four values: the one whose number is the lane's slice.
__device__ __forceinline__ float sum_of_quad(const float (&values)[kSide], int slice) {
  const bool second = slice & 2, odd = slice & 1;
  float low = second ? values[2] : values[0], high = second ? values[3] : values[1];
  low += __shfl_xor_sync(kAllLanes, second ? values[0] : values[2], 2);
  high += __shfl_xor_sync(kAllLanes, second ? values[1] : values[3], 2);
  return (odd ? high : low) + __shfl_xor_sync(kAllLanes, odd ? low : high, 1);
}

// Of sums over quads of four values of each slice: the one whose number is quad / 2.
__device__ __forceinline__ float sum_over_quads(const float (&values)[kSide], int quad) {
  const bool second = quad & 4, odd = quad & 2;
  float low = second ? values[2] : values[0], high = second ? values[3] : values[1];
  low += __shfl_xor_sync(kAllLanes, second ? values[0] : values[2], 16);
  high += __shfl_xor_sync(kAllLanes, second ? values[1] : values[3], 16);
  const float sum = (odd ? high : low) + __shfl_xor_sync(kAllLanes, odd ? low : high, 8);
  return sum + __shfl_xor_sync(kAllLanes, sum, 4);
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(kAllLanes, value, apart);
  return value;
}

// --- ends of chunks -------------------------------------------------------------------------------------------------

template <bool kCut>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1) dual_backward_ends_kernel(const Arguments a) {
  const hcmen_dual& s = a.s;
  begin_spots(a);
  const Spot at = find_spot(a);
  Cells h, slope;
  load_states(s, at, kCut ? nullptr : s.initial_state, h);
  clear(slope);
  float sum = 0.0f, decay = 1.0f;  // of the chunk so far

  const bool tells = kCut && threadIdx.x == 0 && at.row_block == 0;
  const int begin = at.chunk * a.chunk_tiles;
  const int end = begin + a.chunk_tiles < a.tiles ? begin + a.chunk_tiles : a.tiles;
  for (int tile = begin; tile < end; ++tile) {
    store_cells(h, a.starts + at.tile_number(a, tile) * kCells + at.cell());
    if (tells) a.before[((int64_t)at.batch * a.tiles + tile) * s.head + at.head] = sum;
    if (!kCut && tile == end - 1) return;  // what comes out of the last tile is not asked for

    const int64_t first = (int64_t)tile * kTile;
    const int steps = (int)(s.time - first < kTile ? s.time - first : kTile);
    __syncthreads();
    stage_tile<kCut>(a, tile, steps, 0);
    __syncthreads();
    const Tile here(a, 0);
#pragma unroll 2
    for (int k = 0; k < steps; ++k) {
      const float now = advance_cells(here, k, h);
      if (!kCut) continue;
      float out[kSide], C[kSide];
      here.values(kS, k, out);
      here.C(k, C);
      sum += here.step[k * 4];
      decay *= now;
#pragma unroll
      for (int j = 0; j < kSide; ++j) {
        out[j] *= decay;
#pragma unroll
        for (int i = 0; i < kSide; ++i) slope[j][i] = fmaf(out[j], C[i], slope[j][i]);
      }
    }
  }
  if (kCut) {
    const int64_t kept = at.chunk_number(a);
    store_cells(h, a.ends + kept * kCells + at.cell());
    store_cells(slope, a.slopes + kept * kCells + at.cell());
    if (tells) a.sums[((int64_t)at.batch * a.chunks + at.chunk) * s.head + at.head] = sum;
  }
}

// --- carries --------------------------------------------------------------------------------------------------------

constexpr int kCarryThreads = 128;
constexpr int kCarriedAtOnce = 8;

// One thread for each (direction, batch, column, cell): the states that chunks start from, or the gradients of those
// that they end with. Cells that stand for nothing are zero throughout.
__global__ void __launch_bounds__(kCarryThreads) dual_backward_carries_kernel(const Arguments a) {
  const hcmen_dual& s = a.s;
  constexpr int kCellBlocks = kCells / kCarryThreads;
  const unsigned index = blockIdx.x / kCellBlocks, sequence = index / (unsigned)a.columns;
  const int cell = blockIdx.x % kCellBlocks * kCarryThreads + threadIdx.x;
  const int column = index % (unsigned)a.columns;
  const bool backward = sequence >= s.batch;

  Spot at;
  at.batch = backward ? (int)(sequence - s.batch) : (int)sequence;
  const int lane = cell / kSide % kWarp, warps = a.warps(), block = (unsigned)column / (unsigned)warps;
  const int warp = column - block * warps, row_block = (unsigned)block % (unsigned)a.row_blocks;
  at.head = (unsigned)block / (unsigned)a.row_blocks;
  at.quad = lane / kSide;
  at.first_row = (row_block * a.row_warps + (warp & (a.row_warps - 1))) * kRows;
  at.first_state = (warp >> a.row_warps_shift) * kStates + lane % kSide * kSide;
  const int j = cell / (kSide * kWarp), i = cell % kSide;

  const float A = s.A[at.head];
  const float* const given = backward ? a.g.dlast_state : s.initial_state;
  float state = given && at.there(s, j, i) ? given[at.state(s, j, i)] : 0.0f;

  const int64_t first = (int64_t)at.batch * a.chunks + (backward ? a.chunks - 1 : 0), way = backward ? -1 : 1;
  const int64_t apart = way * a.columns * kCells;
  float* carried = (backward ? a.slopes : a.ends) + (first * a.columns + column) * kCells + cell;
  const float* sums = a.sums + first * s.head + at.head;
  for (int chunk = 0; chunk < a.chunks; chunk += kCarriedAtOnce) {
    float end[kCarriedAtOnce], sum[kCarriedAtOnce];
#pragma unroll
    for (int q = 0; q < kCarriedAtOnce; ++q) {
      const bool there = chunk + q < a.chunks;
      end[q] = there ? carried[q * apart] : 0.0f;
      sum[q] = there ? sums[q * way * s.head] : 0.0f;
    }
#pragma unroll
    for (int q = 0; q < kCarriedAtOnce; ++q) {
      if (chunk + q < a.chunks) carried[q * apart] = state;
      state = fmaf(step::decay(sum[q], A), state, end[q]);
    }
    carried += kCarriedAtOnce * apart;
    sums += kCarriedAtOnce * way * s.head;
  }
}

// --- the main pass --------------------------------------------------------------------------------------------------

// The states before step `upto` of a tile.
__device__ __forceinline__ void find_states(const Arguments& a, const Tile& here, int tile, int upto, Cells& h) {
  const Spot at = find_spot(a);
  load_cells(a.starts + at.tile_number(a, tile) * kCells + at.cell(), h);
  if (a.chunks > 1) {
    Cells carried;
    load_cells(a.ends + at.chunk_number(a) * kCells + at.cell(), carried);
    const float before = a.before[((int64_t)at.batch * a.tiles + tile) * a.s.head + at.head];
    const float decay = step::decay(before, a.s.A[at.head]);
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
#pragma unroll
      for (int i = 0; i < kSide; ++i) h[j][i] = fmaf(decay, carried[j][i], h[j][i]);
    }
  }
#pragma unroll 1
  for (int k = 0; k < upto; ++k) advance_cells(here, k, h);
}

// Back over step k of a tile, from the states before and after it: `gradient` comes in as that of the states after it and
// goes out as that of those before. Writes parts of the gradients and of y; returns the lane's part of
// decay <gradient, before>.
__device__ __forceinline__ float go_back(const Tile& here, int k, const Cells& after, const Cells& before,
                                         Cells& gradient, float* of_rows, float* of_states) {
  const int lane = threadIdx.x % kWarp, slice = lane % kSide, quad = lane / kSide;
  float out[kSide], C[kSide], y[kSide], dC[kSide];
  here.values(kS, k, out);
  here.C(k, C);
#pragma unroll
  for (int j = 0; j < kSide; ++j) y[j] = dC[j] = 0.0f;
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      y[j] = fmaf(C[i], after[j][i], y[j]);
      dC[i] = fmaf(out[j], after[j][i], dC[i]);
      gradient[j][i] = fmaf(C[i], out[j], gradient[j][i]);
    }
  }
  of_rows[Memory::kOutputs] = sum_of_quad(y, slice);
  const float my_dC = sum_over_quads(dC, quad);
  if (quad & 1) of_states[kStates] = my_dC;

  float input[kSide], B[kSide], step[4], through[kSide], dB[kSide], kept[kSide];
  here.values(kX, k, input);
  here.B(k, B);
  load(here.step + k * 4, step);
#pragma unroll
  for (int j = 0; j < kSide; ++j) through[j] = dB[j] = kept[j] = 0.0f;
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
    input[j] *= step[0];
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      float& mine = gradient[j][i];
      dB[i] = fmaf(mine, input[j], dB[i]);
      through[j] = fmaf(mine, B[i], through[j]);
      mine *= step[1];
      kept[i] = fmaf(mine, before[j][i], kept[i]);
    }
  }
  of_rows[Memory::kThrough] = sum_of_quad(through, slice);
  const float my_dB = sum_over_quads(dB, quad);
  if (!(quad & 1)) of_states[0] = my_dB;
  return (kept[0] + kept[1]) + (kept[2] + kept[3]);
}

__global__ void __launch_bounds__(kMostWarps* kWarp, 1) dual_backward_kernel(const Arguments a) {
  const hcmen_dual& s = a.s;
  const hcmen_dual_grad& g = a.g;
  float* const memory = shared_memory();

  begin_spots(a);
  Cells gradient;
  int tile;
  {
    const Spot at = find_spot(a);
    tile = (at.chunk + 1) * a.chunk_tiles < a.tiles ? (at.chunk + 1) * a.chunk_tiles : a.tiles;
    if (a.chunks > 1) {
      load_cells(a.slopes + at.chunk_number(a) * kCells + at.cell(), gradient);
    } else {
      load_states(s, at, g.dlast_state, gradient);
    }
  }
  if (threadIdx.x < 2 * kSub) memory[Memory(a).parameters + threadIdx.x] = 0.0f;
  memory[Memory(a).parts + threadIdx.x / kWarp * Memory::kPartsSize + Memory::kD + threadIdx.x % kWarp] = 0.0f;

  while (--tile >= find_spot(a).chunk * a.chunk_tiles) {
    const int64_t first = (int64_t)tile * kTile;
    const int steps = (int)(s.time - first < kTile ? s.time - first : kTile), turn = tile & 1;
    stage_tile<true>(a, tile, steps, turn);
    __syncthreads();
    const Tile here(a, turn);

    for (int sub = (steps - 1) / kSub; sub >= 0; --sub) {
      // The states after the four steps, before the third and before the fourth. Those before the second are found once
      // more when they are needed, in the registers of these.
      Cells last, third, fourth;
      find_states(a, here, tile, sub * kSub, last);
      advance_cells(here, sub * kSub, last);
      advance_cells(here, anew_after(last[3][3], sub * kSub + 1), last);
      copy_cells(last, third);
      advance_cells(here, anew_after(last[3][3], sub * kSub + 2), last);
      copy_cells(last, fourth);
      advance_cells(here, anew_after(last[3][3], sub * kSub + 3), last);
      const Memory where(a);
      const int thread = anew((int)threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
      const int slice = lane % kSide, quad = lane / kSide;
      float* const parts = memory + where.parts + warp * Memory::kPartsSize + lane;
      float* const of_states = parts - lane + Memory::kProjections + slice * kSide + quad / 2;
      float kept[kSub];
      kept[3] = go_back(here, anew_after(last[3][3], sub * kSub + 3), last, fourth, gradient, parts + 3 * kWarp, of_states + 3 * kWarp);
      kept[2] = go_back(here, anew_after(kept[3], sub * kSub + 2), fourth, third, gradient, parts + 2 * kWarp, of_states + 2 * kWarp);
      Cells start, second;
      find_states(a, here, tile, anew_after(kept[2], sub * kSub), start);
      copy_cells(start, second);
      advance_cells(here, sub * kSub, second);
      kept[1] = go_back(here, anew_after(second[3][3], sub * kSub + 1), third, second, gradient, parts + kWarp, of_states + kWarp);
      kept[0] = go_back(here, anew_after(kept[1], sub * kSub), second, start, gradient, parts, of_states);
      {
        float total = sum_of_quad(kept, slice);
#pragma unroll
        for (int apart = kSide; apart < kWarp; apart *= 2) total += __shfl_xor_sync(kAllLanes, total, apart);
        if (lane < kSub) parts[Memory::kKept + sub * kSub] = total;
      }
      __syncthreads();

      // Over the warps of the block.
      const Spot at = find_spot(a);
      const int64_t way = s.reverse ? -1 : 1, first_row = row_of(s, at, first) + way * sub * kSub;
      {
        const int row = at.first_row + at.lane;
#pragma unroll 1
        for (int q = at.state_warp; q < kSub; q += a.state_warps) {
          const int k = sub * kSub + q;
          float y = 0.0f, through = 0.0f;
          for (int w = 0; w < a.state_warps; ++w) {
            const int place = where.parts + (w * a.row_warps + at.row_warp) * Memory::kPartsSize + q * kWarp + at.lane;
            y += memory[place + Memory::kOutputs];
            through += memory[place + Memory::kThrough];
          }
          const float* const mine = memory + at.row_warp * Memory::kSeriesSize + k * kWarp + at.lane;
          const float x = mine[kX * kTile * kWarp], out = mine[kS * kTile * kWarp];
          if (k < steps && row < s.head_dim) {
            const float D = s.D[s.wide_D ? at.head * s.head_dim + row : at.head];
            const int64_t element = ((first_row + way * q) * s.head + at.head) * s.head_dim + row;
            g.dx[element] = fmaf(D, out, memory[where.steps + (turn * kTile + k) * 4] * through);
            if (g.dz) g.dz[element] = mine[kGate * kTile * kWarp] * fmaf(D, x, y);
            memory[where.parts + at.warp * Memory::kPartsSize + Memory::kD + at.lane] += out * x;
          }
          const float dot = sum_of_warp(x * through);
          if (at.lane == 0) memory[where.dots + at.row_warp * kTile + k] = dot;
        }
        const int n = at.state_warp * kStates + at.lane % kStates;
        float* const to = (at.lane < kStates ? a.parts_B : a.parts_C) + at.part * (s.batch * s.time * s.group * s.state) + n;
#pragma unroll 1
        for (int q = at.row_warp; q < kSub; q += a.row_warps) {
          if (sub * kSub + q >= steps || n >= s.state) break;
          float sum = 0.0f;
          for (int w = 0; w < a.row_warps; ++w) {
            const int of_warp = where.parts + (at.state_warp * a.row_warps + w) * Memory::kPartsSize;
            sum += memory[of_warp + Memory::kProjections + q * kWarp + at.lane];
          }
          to[projection_of(s, at, first_row + way * q)] = sum;
        }
      }
      __syncthreads();
      if (at.warp == 0 && at.lane < kSub && sub * kSub + at.lane < steps) {
        const int k = sub * kSub + at.lane;
        float total = 0.0f, dot = 0.0f;
        for (int w = 0; w < a.warps(); ++w) total += memory[where.parts + w * Memory::kPartsSize + Memory::kKept + k];
        for (int w = 0; w < a.row_warps; ++w) dot += memory[where.dots + w * kTile + k];
        const float* const step = memory + where.steps + (turn * kTile + k) * 4;
        const float ddt = step[2] * fmaf(s.A[at.head], total, dot);
        a.parts_dt[(at.row_block * s.batch * s.time + first_row + way * at.lane) * s.head + at.head] = ddt;
        float* const sums = memory + where.parameters + at.lane;
        sums[0] = fmaf(step[0], total, sums[0]);
        sums[kSub] += ddt;
      }
    }
  }

  const Spot at = find_spot(a);
  const Memory where(a);
  const int64_t block = (((int64_t)at.batch * a.chunks + at.chunk) * s.head + at.head) * a.row_blocks + at.row_block;
  float* const parameters = a.parts_parameters + block * a.parameters();
  __syncthreads();
  if (threadIdx.x < 2) {
    const float* const sums = memory + where.parameters + threadIdx.x * kSub;
    parameters[threadIdx.x] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  if (at.state_warp == 0) {
    float dD = 0.0f;
    for (int w = 0; w < a.state_warps && w < kSub; ++w) {
      dD += memory[where.parts + (w * a.row_warps + at.row_warp) * Memory::kPartsSize + Memory::kD + at.lane];
    }
    if (!s.wide_D) dD = sum_of_warp(dD);
    parameters[2 + at.row_warp * kRows + at.lane] = dD;
  }
  if (g.dinitial_state && at.chunk == 0) {
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        if (at.there(s, j, i)) g.dinitial_state[at.state(s, j, i)] = gradient[j][i];
      }
    }
  }
}

// --- sums -----------------------------------------------------------------------------------------------------------

constexpr int kSumThreads = 128;
constexpr int kMostSums = 3;

// Sums of `count` arrays of `size` floats that lie `size` apart.
struct PlainSum {
  const float* parts;
  int64_t count, size;
  float* to;
};

struct SumsArguments {
  PlainSum plain[kMostSums];
  int plain_count;
  // Of parameters, over `rows` sequences and chunks; 0: not yet.
  int64_t rows;
  Arguments all;
};

__device__ __forceinline__ float sum_up(const float* from, int64_t count, int64_t apart) {
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t i = 0; i < count; ++i) sum += from[i * apart];
  return sum;
}

__global__ void __launch_bounds__(kSumThreads) dual_backward_sums_kernel(const SumsArguments a) {
  int64_t index = (int64_t)blockIdx.x * kSumThreads + threadIdx.x;
  for (int i = 0; i < a.plain_count; ++i) {
    const PlainSum& one = a.plain[i];
    if (index < one.size) {
      one.to[index] = sum_up(one.parts + index, one.count, one.size);
      return;
    }
    index -= one.size;
  }
  // Of each head A, dt_bias, and its rows of D.
  const hcmen_dual& s = a.all.s;
  const int64_t numbers = 2 + (s.wide_D ? s.head_dim : 1);
  if (a.rows == 0 || index >= s.head * numbers) return;
  const int64_t head = index / numbers, number = index % numbers, apart = s.head * a.all.row_blocks * a.all.parameters();
  const float* const from = a.all.parts_parameters + head * a.all.row_blocks * a.all.parameters();
  if (s.wide_D && number >= 2) {
    const int64_t row = number - 2, block = row / a.all.rows();
    const float* const mine = from + block * a.all.parameters() + 2 + row % a.all.rows();
    a.all.g.dD[head * s.head_dim + row] = sum_up(mine, a.rows, apart);
    return;
  }
  float sum = 0.0f;
  for (int block = 0; block < a.all.row_blocks; ++block) {
    const float* const mine = from + block * a.all.parameters() + number;
    for (int w = 0; w < (number < 2 ? 1 : a.all.row_warps); ++w) sum += sum_up(mine + w * kRows, a.rows, apart);
  }
  (number == 0 ? a.all.g.dA : number == 1 ? a.all.g.ddt_bias : a.all.g.dD)[head] = sum;
}

// --- launches -------------------------------------------------------------------------------------------------------

// Where the arrays of the workspace begin, in floats, and where it ends.
struct Workspace {
  int64_t parameters, starts, before, sums, ends, slopes, B, C, dt, end;
};

int64_t projection_parts(const hcmen_dual& s, const BackwardPlan& p) { return s.head / s.group * p.row_blocks; }

Workspace share_out(const hcmen_dual& s, const BackwardPlan& p) {
  Workspace w{};
  int64_t next = 0;
  const auto take = [&](int64_t floats) {
    const int64_t at = next;
    next += rounded(floats);
    return at;
  };
  const int64_t warps = p.portion * p.columns, projections = p.portion * s.time * s.group * s.state;
  w.parameters = take(s.batch * p.chunks * s.head * p.row_blocks * (2 + kRows * p.row_warps));
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

// `s` and `g` from sequence number `first` on, `count` of them.
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

int launch_sums(const SumsArguments& sums, void* stream) {
  const hcmen_dual& s = sums.all.s;
  int64_t size = sums.rows ? s.head * (2 + (s.wide_D ? s.head_dim : 1)) : 0;
  for (int i = 0; i < sums.plain_count; ++i) size += sums.plain[i].size;
  if (size == 0) return HCMEN_OK;
  return launch(dual_backward_sums_kernel, ceil_div(size, kSumThreads), kSumThreads, 0, stream, sums);
}

int backward(const hcmen_dual& s, const hcmen_dual_grad& g, const BackwardPlan& plan, const hcmen_cuda_launch& with) {
  float* const memory = static_cast<float*>(with.workspace);
  const Workspace w = share_out(s, plan);
  const bool cut = plan.chunks > 1;
  Arguments a{};
  a.row_warps_shift = log2_of(plan.row_warps);
  a.row_warps = plan.row_warps;
  a.state_warps = plan.state_warps;
  a.row_blocks = (int)plan.row_blocks;
  a.columns = (int)plan.columns;
  a.tiles = (int)plan.tiles;
  a.chunk_tiles = (int)plan.chunk_tiles;
  a.chunks = (int)plan.chunks;
  a.starts = memory + w.starts;
  a.before = memory + w.before;
  a.sums = memory + w.sums;
  a.ends = memory + w.ends;
  a.slopes = memory + w.slopes;
  const int threads = a.warps() * kWarp;
  const int64_t bytes = (int64_t)sizeof(float) * Memory(a).end;

  for (int64_t first = 0; first < s.batch; first += plan.portion) {
    const int64_t count = s.batch - first < plan.portion ? s.batch - first : plan.portion;
    a.s = portion_of(s, first, count);
    a.g = portion_of(s, g, first);
    a.parts_parameters = memory + w.parameters + first * plan.chunks * s.head * plan.row_blocks * a.parameters();
    SumsArguments sums{};
    const auto add_up = [&](int64_t at, int64_t parts_count, int64_t size, float* to) {
      if (parts_count == 1) return to;
      sums.plain[sums.plain_count++] = {memory + at, parts_count, size, to};
      return memory + at;
    };
    const int64_t projections = count * s.time * s.group * s.state;
    a.parts_B = add_up(w.B, projection_parts(s, plan), projections, a.g.dB);
    a.parts_C = add_up(w.C, projection_parts(s, plan), projections, a.g.dC);
    a.parts_dt = add_up(w.dt, plan.row_blocks, count * s.time * s.head, a.g.ddt);

    const int64_t blocks = count * s.head * plan.row_blocks * plan.chunks;
    const auto ends = cut ? dual_backward_ends_kernel<true> : dual_backward_ends_kernel<false>;
    if (const int status = launch(ends, blocks, threads, bytes, with.stream, a)) return status;
    if (cut) {
      const int64_t carries = 2 * count * plan.columns * (kCells / kCarryThreads);
      if (const int status = launch(dual_backward_carries_kernel, carries, kCarryThreads, 0, with.stream, a)) return status;
    }
    if (const int status = launch(dual_backward_kernel, blocks, threads, bytes, with.stream, a)) return status;

    sums.all = a;
    if (first + count == s.batch) {
      sums.rows = s.batch * plan.chunks;
      sums.all.parts_parameters = memory + w.parameters;
    }
    if (const int status = launch_sums(sums, with.stream)) return status;
  }
  return HCMEN_OK;
}

}  // namespace

int load_dual_backward_kernels() {
  return load_kernels(dual_backward_ends_kernel<true>, dual_backward_ends_kernel<false>, dual_backward_carries_kernel,
                      dual_backward_kernel, dual_backward_sums_kernel);
}

int backward_workspace(const hcmen_dual& s, const hcmen_cuda_launch* wish, int64_t* floats) {
  BackwardPlan plan;
  if (const int status = plan_backward(s, wish, &plan)) return status;
  *floats = share_out(s, plan).end;
  return HCMEN_OK;
}

}  // namespace cuda
}  // namespace hcmen

extern "C" {

HCMEN_API int hcmen_cuda_state_space_dual_backward(const hcmen_dual* dual, const hcmen_dual_grad* grad,
                                                   const hcmen_cuda_launch* launch) {
  using namespace hcmen::cuda;
  if (!dual || !grad || !launch) return HCMEN_BAD_ARGUMENT;
  if (const int status = check_sizes(*dual, HCMEN_CUDA_BACKWARD_STATES)) return status;
  if (const int status = check_inputs(*dual)) return status;
  const hcmen_dual_grad& g = *grad;
  if (dual->dtype != HCMEN_FLOAT32) return HCMEN_BAD_ARGUMENT;
  if (!g.dy || !g.dx || !g.ddt || !g.dA || !g.dB || !g.dC || !g.dD || !g.ddt_bias) return HCMEN_BAD_ARGUMENT;
  if ((g.dz == nullptr) != (dual->z == nullptr)) return HCMEN_BAD_ARGUMENT;
  BackwardPlan plan;
  if (const int status = plan_backward(*dual, launch, &plan)) return status;
  if (const int status = check_workspace(*launch, share_out(*dual, plan).end)) return status;
  return backward(*dual, g, plan, *launch);
}

}  // extern "C"
