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
  int row_warps, state_warps, row_blocks, columns, tiles, chunk_tiles, chunks;
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

// Where the arrays of a block lie, in floats.
struct Memory {
  int projections;           // behind [kSeries][kTile][rows()]: [kTile][state_warps][B, C][kStates]
  int outputs, through;      // [kSub][state_warps][rows()]: parts of y, of g B
  int projection_gradients;  // [kSub][row_warps][state_warps][B, C][kStates]
  int steps;                 // [2][kTile][4]: step size, decay and slope, by turns of tiles
  int kept, dots;            // [kTile][warps()], [kTile][row_warps]: parts of the gradient of the step size
  int parameters;            // [2][kSub]: gradients of A and dt_bias so far
  int end;

  HCMEN_HD explicit Memory(const Arguments& a) {
    projections = kSeries * kTile * a.rows();
    outputs = projections + kTile * a.state_warps * kWarp;
    through = outputs + kSub * a.state_warps * a.rows();
    projection_gradients = through + kSub * a.state_warps * a.rows();
    steps = projection_gradients + kSub * a.warps() * kWarp;
    kept = steps + 2 * kTile * 4;
    dots = kept + kTile * a.warps();
    parameters = dots + kTile * a.row_warps;
    end = parameters + 2 * kSub;
  }
};

// --- places ---------------------------------------------------------------------------------------------------------

struct Spot {
  int batch, chunk, head, row_block;
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

// Computed anew by every call, so that no part of it takes a register from here to there.
__device__ __forceinline__ Spot find_spot(const Arguments& a) {
  Spot p;
  const int thread = anew((int)threadIdx.x);
  p.lane = thread % kWarp;
  p.warp = thread / kWarp;
  p.row_warp = p.warp & (a.row_warps - 1);
  p.state_warp = (unsigned)p.warp / (unsigned)a.row_warps;
  p.slice = p.lane % kSide;
  p.quad = p.lane / kSide;
  unsigned index = anew((int)blockIdx.x);
  p.row_block = index % (unsigned)a.row_blocks;
  index /= (unsigned)a.row_blocks;
  p.head = index % (unsigned)a.s.head;
  index /= (unsigned)a.s.head;
  p.chunk = index % (unsigned)a.chunks;
  p.batch = index / (unsigned)a.chunks;
  p.first_row = (p.row_block * a.row_warps + p.row_warp) * kRows;
  p.first_state = p.state_warp * kStates + p.slice * kSide;
  p.column = ((int64_t)p.head * a.row_blocks + p.row_block) * a.warps() + p.warp;
  return p;
}

// The step scanned as number `index`, counted over all sequences.
__device__ __forceinline__ int64_t row_of(const hcmen_dual& s, const Spot& at, int64_t index) {
  return at.batch * s.time + step::place(index, s.time, s.reverse);
}
// The group's first state in B and C, at such a row.
__device__ __forceinline__ int64_t projection_of(const hcmen_dual& s, int head, int64_t row) {
  const unsigned group = (unsigned)head / ((unsigned)s.head / (unsigned)s.group);
  return (row * s.group + group) * s.state;
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
    float* const to = memory + k * a.rows() + at.row_warp * kRows + at.lane;
    to[kX * kTile * a.rows()] = live ? static_cast<const float*>(s.x)[element] : 0.0f;
    if (!kAll) continue;
    const float dy = live ? a.g.dy[element] : 0.0f;
    step::Gate gate{1.0f, 0.0f};
    if (s.z && live) gate = step::gate(static_cast<const float*>(s.z)[element]);
    to[kS * kTile * a.rows()] = dy * gate.value;
    to[kGate * kTile * a.rows()] = dy * gate.slope;
  }
  const bool second = at.lane >= kStates;
  const int n = at.state_warp * kStates + at.lane % kStates;
#pragma unroll 1
  for (int k = at.row_warp; k < kTile; k += a.row_warps) {
    const bool live = k < steps && n < s.state && (kAll || !second);
    const float* const from = static_cast<const float*>(second ? s.C : s.B) + projection_of(s, at.head, first + way * k) + n;
    memory[where.projections + (k * a.state_warps + at.state_warp) * kWarp + at.lane] = live ? *from : 0.0f;
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
  int rows, projection_step;

  __device__ __forceinline__ Tile(const Arguments& a, int turn) {
    const Memory where(a);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    rows = a.rows();
    series = shared_memory() + (warp & (a.row_warps - 1)) * kRows + lane / kSide * kSide;
    projection_step = a.state_warps * kWarp;
    projection = shared_memory() + where.projections + (unsigned)warp / (unsigned)a.row_warps * kWarp + lane % kSide * kSide;
    step = shared_memory() + where.steps + turn * kTile * 4;
  }
  __device__ __forceinline__ void values(int which, int k, float (&to)[kSide]) const {
    load(series + (which * kTile + k) * rows, to);
  }
  __device__ __forceinline__ void B(int k, float (&to)[kSide]) const { load(projection + k * projection_step, to); }
  __device__ __forceinline__ void C(int k, float (&to)[kSide]) const { load(projection + k * projection_step + kStates, to); }
};

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
__global__ void __launch_bounds__(kMostWarps* kWarp) dual_backward_ends_kernel(const Arguments a) {
  const hcmen_dual& s = a.s;
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
  at.first_state = (int)((unsigned)warp / (unsigned)a.row_warps) * kStates + lane % kSide * kSide;
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

__global__ void __launch_bounds__(kMostWarps* kWarp, 1) dual_backward_kernel(const Arguments a) {
  const hcmen_dual& s = a.s;
  const hcmen_dual_grad& g = a.g;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, slice = lane % kSide, quad = lane / kSide;
  const int row_warp = warp & (a.row_warps - 1), state_warp = (unsigned)warp / (unsigned)a.row_warps;
  float* const memory = shared_memory();

  Cells gradient;
  int begin, tile;
  {
    const Spot at = find_spot(a);
    begin = at.chunk * a.chunk_tiles;
    tile = begin + a.chunk_tiles < a.tiles ? begin + a.chunk_tiles : a.tiles;
    if (a.chunks > 1) {
      load_cells(a.slopes + at.chunk_number(a) * kCells + at.cell(), gradient);
    } else {
      load_states(s, at, g.dlast_state, gradient);
    }
  }
  if (threadIdx.x < 2 * kSub) memory[Memory(a).parameters + threadIdx.x] = 0.0f;
  float dD = 0.0f;

  while (--tile >= begin) {
    const int64_t first = (int64_t)tile * kTile;
    const int steps = (int)(s.time - first < kTile ? s.time - first : kTile), turn = tile & 1;
    stage_tile<true>(a, tile, steps, turn);
    __syncthreads();
    const Tile here(a, turn);

    for (int sub = (steps - 1) / kSub; sub >= 0; --sub) {
      Cells h, before[kSub - 1];  // before steps but the first
      find_states(a, here, tile, sub * kSub, h);
      {
        const Memory where(a);
        float* const outputs = memory + where.outputs + state_warp * a.rows() + row_warp * kRows + lane;
        float* const dC_parts = memory + where.projection_gradients + (row_warp * a.state_warps + state_warp) * kWarp;
#pragma unroll
        for (int q = 0; q < kSub; ++q) {
          const int k = sub * kSub + q;
          if (q > 0) {
#pragma unroll
            for (int j = 0; j < kSide; ++j) {
#pragma unroll
              for (int i = 0; i < kSide; ++i) before[q - 1][j][i] = h[j][i];
            }
          }
          advance_cells(here, k, h);
          float out[kSide], C[kSide], y[kSide], dC[kSide];
          here.values(kS, k, out);
          here.C(k, C);
#pragma unroll
          for (int j = 0; j < kSide; ++j) y[j] = dC[j] = 0.0f;
#pragma unroll
          for (int j = 0; j < kSide; ++j) {
#pragma unroll
            for (int i = 0; i < kSide; ++i) {
              y[j] = fmaf(C[i], h[j][i], y[j]);
              dC[i] = fmaf(out[j], h[j][i], dC[i]);
            }
          }
          outputs[q * a.state_warps * a.rows()] = sum_of_quad(y, slice);
          const float my_dC = sum_over_quads(dC, quad);
          if (quad & 1) dC_parts[q * a.warps() * kWarp + kStates + slice * kSide + quad / 2] = my_dC;
        }
      }
      float kept[kSub];
      {
        const Memory where(a);
        float* const throughs = memory + where.through + state_warp * a.rows() + row_warp * kRows + lane;
        float* const dB_parts = memory + where.projection_gradients + (row_warp * a.state_warps + state_warp) * kWarp;
#pragma unroll
        for (int q = kSub - 1; q >= 0; --q) {
          const int k = sub * kSub + q;
          if (q == 0) find_states(a, here, tile, sub * kSub, h);
          float input[kSide], out[kSide], B[kSide], C[kSide], step[4], through[kSide], dB[kSide], parts[kSide];
          here.values(kX, k, input);
          here.values(kS, k, out);
          here.B(k, B);
          here.C(k, C);
          load(here.step + k * 4, step);
#pragma unroll
          for (int j = 0; j < kSide; ++j) through[j] = dB[j] = parts[j] = 0.0f;
#pragma unroll
          for (int j = 0; j < kSide; ++j) {
            input[j] *= step[0];
#pragma unroll
            for (int i = 0; i < kSide; ++i) {
              float& mine = gradient[j][i];
              mine = fmaf(C[i], out[j], mine);
              dB[i] = fmaf(mine, input[j], dB[i]);
              through[j] = fmaf(mine, B[i], through[j]);
              mine *= step[1];
              parts[i] = fmaf(mine, q > 0 ? before[q > 0 ? q - 1 : 0][j][i] : h[j][i], parts[i]);
            }
          }
          throughs[q * a.state_warps * a.rows()] = sum_of_quad(through, slice);
          const float my_dB = sum_over_quads(dB, quad);
          if (!(quad & 1)) dB_parts[q * a.warps() * kWarp + slice * kSide + quad / 2] = my_dB;
          kept[q] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
        }
      }
      const Memory where(a);
      {
        float total = sum_of_quad(kept, slice);
#pragma unroll
        for (int apart = kSide; apart < kWarp; apart *= 2) total += __shfl_xor_sync(kAllLanes, total, apart);
        if (lane < kSub) memory[where.kept + (sub * kSub + lane) * a.warps() + warp] = total;
      }
      __syncthreads();

      // Over the warps of the block.
      const Spot at = find_spot(a);
      const int64_t way = s.reverse ? -1 : 1, first_row = row_of(s, at, first) + way * sub * kSub;
      {
        const int row = at.first_row + lane, place = row_warp * kRows + lane;
#pragma unroll 1
        for (int q = state_warp; q < kSub; q += a.state_warps) {
          const int k = sub * kSub + q;
          float y = 0.0f, through = 0.0f;
          for (int w = 0; w < a.state_warps; ++w) {
            y += memory[where.outputs + (q * a.state_warps + w) * a.rows() + place];
            through += memory[where.through + (q * a.state_warps + w) * a.rows() + place];
          }
          const float* const mine = memory + k * a.rows() + place;
          const float x = mine[kX * kTile * a.rows()], out = mine[kS * kTile * a.rows()];
          if (k < steps && row < s.head_dim) {
            const float D = s.D[s.wide_D ? at.head * s.head_dim + row : at.head];
            const int64_t element = ((first_row + way * q) * s.head + at.head) * s.head_dim + row;
            g.dx[element] = fmaf(D, out, memory[where.steps + (turn * kTile + k) * 4] * through);
            if (g.dz) g.dz[element] = mine[kGate * kTile * a.rows()] * fmaf(D, x, y);
            dD = fmaf(out, x, dD);
          }
          const float dot = sum_of_warp(x * through);
          if (lane == 0) memory[where.dots + k * a.row_warps + row_warp] = dot;
        }
        const int n = state_warp * kStates + lane % kStates;
        const int64_t part = (at.head % (int)((unsigned)s.head / (unsigned)s.group)) * a.row_blocks + at.row_block;
        float* const to = (lane < kStates ? a.parts_B : a.parts_C) + part * (s.batch * s.time * s.group * s.state) + n;
#pragma unroll 1
        for (int q = row_warp; q < kSub; q += a.row_warps) {
          if (sub * kSub + q >= steps || n >= s.state) break;
          float sum = 0.0f;
          for (int w = 0; w < a.row_warps; ++w) {
            sum += memory[where.projection_gradients + ((q * a.row_warps + w) * a.state_warps + state_warp) * kWarp + lane];
          }
          to[projection_of(s, at.head, first_row + way * q)] = sum;
        }
      }
      __syncthreads();
      if (warp == 0 && lane < kSub && sub * kSub + lane < steps) {
        const int k = sub * kSub + lane;
        float total = 0.0f, dot = 0.0f;
        for (int w = 0; w < a.warps(); ++w) total += memory[where.kept + k * a.warps() + w];
        for (int w = 0; w < a.row_warps; ++w) dot += memory[where.dots + k * a.row_warps + w];
        const float* const step = memory + where.steps + (turn * kTile + k) * 4;
        const float ddt = step[2] * fmaf(s.A[at.head], total, dot);
        a.parts_dt[(at.row_block * s.batch * s.time + first_row + way * lane) * s.head + at.head] = ddt;
        float* const sums = memory + where.parameters + lane;
        sums[0] = fmaf(step[0], total, sums[0]);
        sums[kSub] += ddt;
      }
    }
  }

  const Spot at = find_spot(a);
  const Memory where(a);
  const int64_t block = (((int64_t)at.batch * a.chunks + at.chunk) * s.head + at.head) * a.row_blocks + at.row_block;
  float* const parameters = a.parts_parameters + block * a.parameters();
  if (state_warp < kSub) memory[where.outputs + state_warp * a.rows() + row_warp * kRows + lane] = dD;
  __syncthreads();
  if (threadIdx.x < 2) {
    const float* const sums = memory + where.parameters + threadIdx.x * kSub;
    parameters[threadIdx.x] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  if (state_warp == 0) {
    dD = 0.0f;
    for (int w = 0; w < a.state_warps && w < kSub; ++w) dD += memory[where.outputs + w * a.rows() + row_warp * kRows + lane];
    if (!s.wide_D) dD = sum_of_warp(dD);
    parameters[2 + row_warp * kRows + lane] = dD;
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
