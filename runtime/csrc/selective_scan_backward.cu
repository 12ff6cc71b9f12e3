// The gradients of the selective scan on a CUDA device. The arithmetic is in scan_step.h; here it is shared out.
//
// A warp takes 32 channels and 16 states. A lane holds four channels of four states each: lanes 4 q to 4 q + 3, a quad,
// share four channels, lane & 3 tells which states. What belongs to a channel alone (step sizes, gates, their slopes)
// is done by the lane of the channel's number. Channels beyond are other warps, more than 16 states other blocks, whose
// du, ddelta and dz are added up afterwards.
//
// Steps are taken in tiles of kTile, and tiles in chunks, one chunk to a block. Three launches:
//
//   ends     walks each chunk forward and keeps the states before every tile. Where there are several chunks it starts
//            from zero states, and finds besides what a chunk makes of them and which gradient its outputs alone give
//            the states before it
//   carries  where there are several chunks: walks over them, forward for the states that each starts from, backward
//            for the gradient of the states that it ends with
//   main     takes the tiles of a chunk from the last to the first. Of a tile it recomputes the states, kSub steps at a
//            time, in registers, and then goes back over these steps
//
// A last launch adds up: gradients of B and C over the blocks of channels, those of A, D and delta_bias over sequences
// and chunks. Every sum has one order. Sequences are taken in portions that keep the workspace small.
//
// What lies past an end (of time, channels, states) is taken as zero: a step of size zero leaves every state and every
// gradient as it was.
#include "cuda_backward.h"
#include "selective_scan_cuda.h"

namespace hcmen {
namespace cuda {
namespace {

constexpr int kSide = 4;                       // channels, and states, of a lane
constexpr int kChannels = 32, kStates = 16;    // of a warp
constexpr int kCells = kChannels * kStates;    // as [channel of a lane][lane][state of a lane]
constexpr int kSub = 4;                        // steps whose states are in registers
constexpr int kTile = 2 * kSub;
constexpr int kRows = kTile * kWarp;           // one number of each channel and step of a tile
constexpr int kMostWarps = 4;                  // of a block
constexpr int kParameters = kCells + 2 * kChannels;  // gradients of A, D and delta_bias that a warp has

// Rows of a warp in shared memory.
enum { kU, kD, kInputRows, kS = kInputRows, kSlope, kGate, kSeriesRows };

// --- plans ----------------------------------------------------------------------------------------------------------

// Warps that a device shall have to do, where a sequence must be cut for it: three blocks on each of 132
// multiprocessors. Fewer, and they run short; a few more, and most wait for the last.
constexpr int64_t kEnoughWarps = 132 * 12;

struct BackwardPlan : BackwardCut {
  int warps;  // of a block, side by side over channels
  int64_t channel_blocks, state_blocks, columns;  // of a group; of a channel; warps that a sequence takes
};

int plan_backward(const hcmen_scan& s, const hcmen_cuda_launch* wish, BackwardPlan* plan) {
  const int64_t group_channels = s.channel / s.group;
  if (group_channels > INT32_MAX - kMostWarps * kChannels) return HCMEN_BAD_ARGUMENT;
  BackwardPlan p{};
  p.warps = kMostWarps;
  while (p.warps > 1 && p.warps / 2 * kChannels >= group_channels) p.warps /= 2;
  p.channel_blocks = ceil_div(group_channels, p.warps * kChannels);
  p.state_blocks = ceil_div(s.state, kStates);
  p.columns = s.group * p.channel_blocks * p.warps * p.state_blocks;
  if (const int status = cut_backward(s.batch, s.time, p.columns, kTile, kEnoughWarps, wish, &p)) return status;
  *plan = p;
  return HCMEN_OK;
}

struct BackwardArguments {
  hcmen_scan s;       // of a portion
  hcmen_scan_grad g;  // of a portion; du, ddelta and dz may be those of the first state block, in the workspace
  int warps, channel_blocks, state_blocks, tiles, chunk_tiles, chunks;
  int group, group_channels;
  int columns;
  int64_t series;  // elements of u, of a portion
  float* starts;  // [batch, tiles, columns, kCells]
  // With several chunks.
  float* before;  // [batch, tiles, columns, kChannels]: sums of step sizes of a chunk before each of its tiles
  float* sums;    // [batch, chunks, columns, kChannels]: sums of step sizes of a chunk
  float* ends;    // [batch, chunks, columns, kCells]: ends of chunks, then the states that they start from
  float* slopes;  // [batch, chunks, columns, kCells]: gradients that chunks make, then those that they are given
  float* parts_B;  // [channel_blocks, batch, time, group, state], or dB itself where there is one block
  float* parts_C;
  float* parts_parameters;  // [batch, chunks, columns, kParameters]
};

// --- warps ----------------------------------------------------------------------------------------------------------

// The place of a warp in the arrays, and of its lane.
struct Spot {
  int batch, chunk, group, channel_block, state_block;
  int column;  // number of the warp, among those that a sequence takes
  int lane, warp, slice, quad;
  int64_t channel;  // first of the warp
  int count;        // channels of the warp that exist
  int first_state;  // of the lane

  // Numbers among all that warps keep of a tile, of a chunk.
  __device__ __forceinline__ int64_t tile_number(const BackwardArguments& a, int tile) const {
    return (batch * a.tiles + tile) * a.columns + column;
  }
  __device__ __forceinline__ int64_t chunk_number(const BackwardArguments& a) const {
    return (batch * a.chunks + chunk) * a.columns + column;
  }
  __device__ __forceinline__ bool own() const { return lane < count; }
  __device__ __forceinline__ int cell() const { return lane * kSide; }
  // Whether the lane's channel number j and state number i exist.
  __device__ __forceinline__ bool there(const hcmen_scan& s, int j, int i) const {
    return quad * kSide + j < count && first_state + i < s.state;
  }
  // Where that state lies in [channel, state].
  __device__ __forceinline__ int64_t state(const hcmen_scan& s, int j, int i) const {
    return (channel + quad * kSide + j) * s.state + first_state + i;
  }
};

// Computed anew by every call, so that no part of it takes a register from here to there.
__device__ __forceinline__ Spot find_spot(const BackwardArguments& a) {
  Spot p;
  const int thread = anew((int)threadIdx.x);
  p.lane = thread % kWarp;
  p.warp = thread / kWarp;
  p.slice = p.lane % kSide;
  p.quad = p.lane / kSide;
  unsigned index = anew((int)blockIdx.x);
  p.channel_block = index % (unsigned)a.channel_blocks;
  index /= (unsigned)a.channel_blocks;
  p.state_block = index % (unsigned)a.state_blocks;
  index /= (unsigned)a.state_blocks;
  p.group = index % (unsigned)a.group;
  index /= (unsigned)a.group;
  p.chunk = index % (unsigned)a.chunks;
  p.batch = index / (unsigned)a.chunks;
  const int first = (p.channel_block * a.warps + p.warp) * kChannels, left = a.group_channels - first;
  p.channel = (int64_t)p.group * a.group_channels + first;
  p.count = left <= 0 ? 0 : left < kChannels ? left : kChannels;
  p.first_state = p.state_block * kStates + p.slice * kSide;
  p.column = ((p.group * a.channel_blocks + p.channel_block) * a.warps + p.warp) * a.state_blocks + p.state_block;
  return p;
}

// A lane's place in u, delta, z and dy, and in B or C, at some step, in elements; and the way to the next step.
struct Walk {
  int64_t series, projection;

  static __device__ __forceinline__ int64_t series_step(const hcmen_scan& s) { return s.reverse ? -s.channel : s.channel; }
  static __device__ __forceinline__ int64_t projection_step(const hcmen_scan& s) {
    const int64_t row = s.group * s.state;
    return s.reverse ? -row : row;
  }
};

__device__ __forceinline__ Walk find_walk(const hcmen_scan& s, const Spot& at, int64_t index) {
  const int64_t place = at.batch * s.time + step::place(index, s.time, s.reverse);
  return {place * s.channel + at.channel + at.lane,
          (place * s.group + at.group) * s.state + at.state_block * kStates + at.lane % kStates};
}

using Cells = float[kSide][kSide];

__device__ __forceinline__ void load_cells(const float* from, Cells& to) {
#pragma unroll
  for (int j = 0; j < kSide; ++j) load(from + j * kWarp * kSide, to[j]);
}

__device__ __forceinline__ void store_cells(const Cells& from, float* to) {
#pragma unroll
  for (int j = 0; j < kSide; ++j) store(from[j], to + j * kWarp * kSide);
}

__device__ __forceinline__ void load_rates(const hcmen_scan& s, const Spot& at, Cells& rate) {
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      rate[j][i] = at.there(s, j, i) ? s.A[at.state(s, j, i)] * step::kLog2e : 0.0f;
    }
  }
}

// States, or gradients of them, as the caller has them: [batch, channel, state], or null for zeros.
__device__ __forceinline__ void load_states(const hcmen_scan& s, const Spot& at, const float* from, Cells& to) {
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      to[j][i] = from && at.there(s, j, i) ? from[at.batch * s.channel * s.state + at.state(s, j, i)] : 0.0f;
    }
  }
}

// The rows of a tile of `steps` steps into `rows` and `row_BC`: u, the step size and, if kAll, the gradient of the output
// before the gate; with kSlopes the slope of the step size, and the gradient of z but for the output; B, and if kAll C.
// The sum of the lane's step sizes is returned. Every lane writes what is its channel's, and reads nothing else.
template <bool kAll, bool kSlopes>
__device__ __forceinline__ float stage_tile(const BackwardArguments& a, const Spot& at, const Walk& walk, int steps,
                                            float* rows, float* row_BC) {
  const hcmen_scan& s = a.s;
  const float* const u = static_cast<const float*>(s.u);
  const float* const delta = static_cast<const float*>(s.delta);
  const float* const z = static_cast<const float*>(s.z);
  const bool second = at.lane >= kStates;  // half of a row of B and C
  const float* const projection = static_cast<const float*>(second ? s.C : s.B);
  const bool there = at.state_block * kStates + at.lane % kStates < s.state && (kAll || !second);
  float* const mine = rows + at.lane;
  int64_t element = walk.series, place = walk.projection;  // advanced by adding: products would all be kept in registers
#pragma unroll
  for (int k = 0; k < kTile; ++k) {
    const bool live = k < steps && at.own();
    mine[kU * kRows + k * kWarp] = live ? u[element] : 0.0f;
    mine[kD * kRows + k * kWarp] = live ? delta[element] : 0.0f;
    if (kAll) mine[kS * kRows + k * kWarp] = live ? a.g.dy[element] : 0.0f;
    if (kAll) mine[kGate * kRows + k * kWarp] = live && z ? z[element] : 0.0f;
    row_BC[k * kWarp + at.lane] = k < steps && there ? projection[place] : 0.0f;
    element += Walk::series_step(s);
    place += Walk::projection_step(s);
  }
  const float bias = at.own() ? s.delta_bias[at.channel + at.lane] : 0.0f;
  float sum = 0.0f;
#pragma unroll 2
  for (int k = 0; k < steps; ++k) {
    const step::StepSize d = step::step_size_and_slope(mine[kD * kRows + k * kWarp], bias, s.delta_softplus);
    mine[kD * kRows + k * kWarp] = d.size;
    if (kSlopes) mine[kSlope * kRows + k * kWarp] = d.slope;
    sum += d.size;
    if (kAll && z) {
      const step::Gate gate = step::gate(mine[kGate * kRows + k * kWarp]);
      const float out = mine[kS * kRows + k * kWarp];
      mine[kS * kRows + k * kWarp] = out * gate.value;
      if (kSlopes) mine[kGate * kRows + k * kWarp] = out * gate.slope;
    }
  }
  return sum;
}

// The states after step k of a tile from those before it.
__device__ __forceinline__ void advance_cells(const float* rows, const float* row_BC, const Spot& at, int k,
                                              const Cells& rate, Cells& h) {
  float d[kSide], u[kSide], B[kSide];
  load(rows + kD * kRows + k * kWarp + at.quad * kSide, d);
  load(rows + kU * kRows + k * kWarp + at.quad * kSide, u);
  load(row_BC + k * kWarp + at.slice * kSide, B);
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
    const float input = d[j] * u[j];
#pragma unroll
    for (int i = 0; i < kSide; ++i) h[j][i] = step::advance(h[j][i], d[j], rate[j][i], input, B[i]);
  }
}

// --- ends of chunks -------------------------------------------------------------------------------------------------

template <bool kCut>
__global__ void __launch_bounds__(kMostWarps * kWarp) scan_backward_ends_kernel(const BackwardArguments a) {
  const hcmen_scan& s = a.s;
  const Spot at = find_spot(a);
  constexpr int kKept = kCut ? (int)kSeriesRows : (int)kInputRows;
  float* const rows = shared_memory() + at.warp * (kKept + 1) * kRows;
  float* const row_BC = rows + kKept * kRows;

  Cells rate, h, decay, slope;
  load_rates(s, find_spot(a), rate);
  load_states(s, find_spot(a), kCut ? nullptr : s.initial_state, h);
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      decay[j][i] = 1.0f;
      slope[j][i] = 0.0f;
    }
  }
  float sum = 0.0f;

  const int begin = at.chunk * a.chunk_tiles;
  const int end = begin + a.chunk_tiles < a.tiles ? begin + a.chunk_tiles : a.tiles;
  for (int tile = begin; tile < end; ++tile) {
    const int64_t kept = at.tile_number(a, tile);
    store_cells(h, a.starts + kept * kCells + at.cell());
    if (kCut) a.before[kept * kChannels + at.lane] = sum;
    if (!kCut && tile == end - 1) return;  // what comes out of the last tile is not asked for

    const int64_t first = (int64_t)tile * kTile;
    const int steps = (int)(s.time - first < kTile ? s.time - first : kTile);
    __syncwarp();
    sum += stage_tile<kCut, false>(a, at, find_walk(s, at, first), steps, rows, row_BC);
    __syncwarp();
#pragma unroll 2
    for (int k = 0; k < steps; ++k) {
      if (!kCut) {
        advance_cells(rows, row_BC, at, k, rate, h);
        continue;
      }
      float d[kSide], u[kSide], out[kSide], B[kSide], C[kSide];
      load(rows + kD * kRows + k * kWarp + at.quad * kSide, d);
      load(rows + kU * kRows + k * kWarp + at.quad * kSide, u);
      load(rows + kS * kRows + k * kWarp + at.quad * kSide, out);
      load(row_BC + k * kWarp + at.slice * kSide, B);
      load(row_BC + k * kWarp + kStates + at.slice * kSide, C);
#pragma unroll
      for (int j = 0; j < kSide; ++j) {
        const float input = d[j] * u[j];
#pragma unroll
        for (int i = 0; i < kSide; ++i) {
          const float now = step::power_of_two(d[j] * rate[j][i]);
          h[j][i] = fmaf(now, h[j][i], input * B[i]);
          decay[j][i] *= now;
          slope[j][i] = fmaf(decay[j][i], C[i] * out[j], slope[j][i]);
        }
      }
    }
  }
  if (kCut) {
    const int64_t kept = at.chunk_number(a);
    store_cells(h, a.ends + kept * kCells + at.cell());
    store_cells(slope, a.slopes + kept * kCells + at.cell());
    a.sums[kept * kChannels + at.lane] = sum;
  }
}

// --- carries --------------------------------------------------------------------------------------------------------

constexpr int kCarryThreads = 128;

// The channel and state that a warp keeps at place `cell` of kCells, as find_spot has it.
struct Cell {
  int64_t channel, state;
  int within;  // number of the channel in the warp
  bool exists;
};

__device__ __forceinline__ Cell find_cell(const BackwardArguments& a, int column, int cell) {
  const int lane = cell / kSide % kWarp;
  const unsigned state_block = (unsigned)column % (unsigned)a.state_blocks, warp = (unsigned)column / (unsigned)a.state_blocks;
  const unsigned warps = a.channel_blocks * a.warps, group = warp / warps;
  Cell c;
  c.within = lane / kSide * kSide + cell / (kSide * kWarp);
  c.state = state_block * kStates + lane % kSide * kSide + cell % kSide;
  const int in_group = (int)(warp % warps) * kChannels + c.within;
  c.channel = (int64_t)group * a.group_channels + in_group;
  c.exists = in_group < a.group_channels && c.state < a.s.state;
  return c;
}

// One thread for each (direction, batch, column, cell): the states that chunks start from, or the gradients of those
// that they end with.
__global__ void __launch_bounds__(kCarryThreads) scan_backward_carries_kernel(const BackwardArguments a) {
  const hcmen_scan& s = a.s;
  constexpr int kCellBlocks = kCells / kCarryThreads;
  const unsigned index = blockIdx.x / kCellBlocks, sequence = index / (unsigned)a.columns;
  const int cell = blockIdx.x % kCellBlocks * kCarryThreads + threadIdx.x;
  const int column = index % (unsigned)a.columns;
  const bool backward = sequence >= s.batch;
  const int64_t batch = backward ? sequence - s.batch : sequence;

  const Cell where = find_cell(a, column, cell);
  const int64_t channel = where.channel, n = where.state;
  if (!where.exists) {
    // Nobody looks at these, but they take part in sums, times zero.
    float* const carried = backward ? a.slopes : a.ends;
    for (int chunk = 0; chunk < a.chunks; ++chunk) {
      carried[((batch * a.chunks + chunk) * a.columns + column) * kCells + cell] = 0.0f;
    }
    return;
  }
  const float rate = s.A[channel * s.state + n] * step::kLog2e;
  const float* const given = backward ? a.g.dlast_state : s.initial_state;
  float state = given ? given[(batch * s.channel + channel) * s.state + n] : 0.0f;

  const int64_t first = (batch * a.chunks + (backward ? a.chunks - 1 : 0)) * a.columns + column;
  const int64_t apart = backward ? -a.columns : a.columns;
  float* carried = (backward ? a.slopes : a.ends) + first * kCells + cell;
  const float* sums = a.sums + first * kChannels + where.within;
  for (int chunk = 0; chunk < a.chunks; chunk += 8) {
    // Loads of eight chunks are under way together.
    float end[8], sum[8];
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      const bool there = chunk + q < a.chunks;
      end[q] = there ? carried[q * apart * kCells] : 0.0f;
      sum[q] = there ? sums[q * apart * kChannels] : 0.0f;
    }
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      if (chunk + q < a.chunks) carried[q * apart * kCells] = state;
      state = step::after({sum[q], end[q]}, rate, state);
    }
    carried += 8 * apart * kCells;
    sums += 8 * apart * kChannels;
  }
}

// --- the main pass --------------------------------------------------------------------------------------------------

constexpr int kMainRows = (kSeriesRows + 3) * kRows + kTile / kSub * kCells;  // floats of a warp

__global__ void __launch_bounds__(kMostWarps * kWarp, 3) scan_backward_kernel(const BackwardArguments a) {
  const hcmen_scan& s = a.s;
  const hcmen_scan_grad& g = a.g;
  const int lane = threadIdx.x % kWarp, slice = lane % kSide, quad = lane / kSide;
  float* const rows = shared_memory() + threadIdx.x / kWarp * kMainRows;
  float* const row_BC = rows + kSeriesRows * kRows;
  float* const kept_states = row_BC + 3 * kRows + lane * kSide;  // behind two sets of rows of dB and dC

  Cells rate, gradient, dA;
  load_rates(s, find_spot(a), rate);
  float D;
  int begin, tile;
  {
    const Spot at = find_spot(a);
    // What no state is in belongs to the first state block.
    D = at.own() && at.state_block == 0 ? s.D[at.channel + lane] : 0.0f;
    begin = at.chunk * a.chunk_tiles;
    tile = begin + a.chunk_tiles < a.tiles ? begin + a.chunk_tiles : a.tiles;
    if (a.chunks > 1) {
      load_cells(a.slopes + at.chunk_number(a) * kCells + at.cell(), gradient);
    } else {
      load_states(s, at, g.dlast_state, gradient);
    }
  }
#pragma unroll
  for (int j = 0; j < kSide; ++j) {
#pragma unroll
    for (int i = 0; i < kSide; ++i) dA[j][i] = 0.0f;
  }
  float dD = 0.0f, dbias = 0.0f;

  while (--tile >= begin) {
    const int64_t first = (int64_t)tile * kTile;
    const int steps = (int)(s.time - first < kTile ? s.time - first : kTile);
    float* const row_gradients = row_BC + (1 + (tile & 1)) * kRows;

    __syncwarp();
    const Spot at = find_spot(a);
    const Walk walk = find_walk(s, at, first);
    stage_tile<true, true>(a, at, walk, steps, rows, row_BC);
    Cells h;
    const int64_t kept = at.tile_number(a, tile);
    load_cells(a.starts + kept * kCells + at.cell(), h);
    if (a.chunks > 1) {
      Cells carried;
      float before[kSide];
      load_cells(a.ends + at.chunk_number(a) * kCells + at.cell(), carried);
      load(a.before + kept * kChannels + at.quad * kSide, before);
#pragma unroll
      for (int j = 0; j < kSide; ++j) {
#pragma unroll
        for (int i = 0; i < kSide; ++i) h[j][i] = step::after({before[j], h[j][i]}, rate[j][i], carried[j][i]);
      }
    }
    __syncwarp();

    const bool own = at.own();
    const int64_t outputs = at.state_block * a.series + walk.series;
    const int last = (steps - 1) / kSub;
    for (int sub = 0; sub < last; ++sub) {
      store_cells(h, kept_states + sub * kCells);
#pragma unroll 2
      for (int q = 0; q < kSub; ++q) advance_cells(rows, row_BC, at, sub * kSub + q, rate, h);
    }
    store_cells(h, kept_states + last * kCells);
    for (int sub = last; sub >= 0; --sub) {
      if (sub < last) load_cells(kept_states + sub * kCells, h);
      int64_t element = outputs + sub * kSub * Walk::series_step(s);
      Cells before[kSub - 1];  // steps but the first
#pragma unroll
      for (int q = 0; q < kSub; ++q) {
        const int k = sub * kSub + q;
        float d[kSide], u[kSide], out[kSide], B[kSide], C[kSide], y[kSide], dC[kSide];
        load(rows + kD * kRows + k * kWarp + quad * kSide, d);
        load(rows + kU * kRows + k * kWarp + quad * kSide, u);
        load(rows + kS * kRows + k * kWarp + quad * kSide, out);
        load(row_BC + k * kWarp + slice * kSide, B);
        load(row_BC + k * kWarp + kStates + slice * kSide, C);
#pragma unroll
        for (int j = 0; j < kSide; ++j) y[j] = dC[j] = 0.0f;
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
          const float input = d[j] * u[j];
#pragma unroll
          for (int i = 0; i < kSide; ++i) {
            if (q > 0) before[q - 1][j][i] = h[j][i];
            h[j][i] = step::advance(h[j][i], d[j], rate[j][i], input, B[i]);
            y[j] = fmaf(C[i], h[j][i], y[j]);
            dC[i] = fmaf(out[j], h[j][i], dC[i]);
          }
        }
        const float my_dC = sum_over_quads(dC, quad);
        if (quad & 1) row_gradients[k * kWarp + kStates + slice * kSide + quad / 2] = my_dC;
        if (g.dz) {
          const float my_y = sum_of_quad(y, slice);
          const int mine = k * kWarp + lane;
          if (own && k < steps) {
            g.dz[element] = rows[kGate * kRows + mine] * fmaf(D, rows[kU * kRows + mine], my_y);
          }
        }
        element += Walk::series_step(s);
      }
#pragma unroll
      for (int q = kSub - 1; q >= 0; --q) {
        const int k = sub * kSub + q;
        element -= Walk::series_step(s);
        if (q == 0) load_cells(kept_states + sub * kCells, h);
        float d[kSide], u[kSide], out[kSide], B[kSide], C[kSide], through[kSide], decayed[kSide], dB[kSide];
        load(rows + kD * kRows + k * kWarp + quad * kSide, d);
        load(rows + kU * kRows + k * kWarp + quad * kSide, u);
        load(rows + kS * kRows + k * kWarp + quad * kSide, out);
        load(row_BC + k * kWarp + slice * kSide, B);
        load(row_BC + k * kWarp + kStates + slice * kSide, C);
#pragma unroll
        for (int j = 0; j < kSide; ++j) through[j] = decayed[j] = dB[j] = 0.0f;
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
          const float input = d[j] * u[j];
#pragma unroll
          for (int i = 0; i < kSide; ++i) {
            step::retreat(q > 0 ? before[q > 0 ? q - 1 : 0][j][i] : h[j][i], d[j], input, out[j], rate[j][i], B[i], C[i], gradient[j][i], dA[j][i], dB[i],
                          through[j], decayed[j]);
          }
        }
        const float my_dB = sum_over_quads(dB, quad);
        if (!(quad & 1)) row_gradients[k * kWarp + slice * kSide + quad / 2] = my_dB;
        const float my_through = sum_of_quad(through, slice), my_decayed = sum_of_quad(decayed, slice);
        if (own && k < steps) {
          const int mine = k * kWarp + lane;
          const float my_u = rows[kU * kRows + mine], my_out = rows[kS * kRows + mine];
          const float my_ddelta =
              rows[kSlope * kRows + mine] * fmaf(step::kLn2, my_decayed, my_u * my_through);
          g.du[element] = fmaf(D, my_out, rows[kD * kRows + mine] * my_through);
          g.ddelta[element] = my_ddelta;
          dbias += my_ddelta;
          dD = fmaf(my_out, my_u, dD);
        }
      }
    }

    // Rows of dB and dC are written again two tiles later, when all threads have been at the barrier between.
    __syncthreads();
    const Spot here = find_spot(a);
    if (here.state_block * kStates + lane % kStates < s.state) {
      // `first` from the tile, not kept until here: else sm_120 spills it.
      const int64_t again = (int64_t)anew_but_on_90(tile) * kTile;
      float* const to = (lane < kStates ? a.parts_B : a.parts_C) + find_walk(s, here, again).projection +
                        here.channel_block * (s.batch * s.time * s.group * s.state);
      for (int k = here.warp; k < steps; k += a.warps) {
        const float* from = shared_memory() + (row_gradients - rows) + k * kWarp + lane;
        float sum = from[0];
        for (int w = 1; w < a.warps; ++w) sum += from[w * kMainRows];
        to[k * Walk::projection_step(s)] = sum;
      }
    }
  }

  const Spot at = find_spot(a);
  float* const parts = a.parts_parameters + at.chunk_number(a) * kParameters;
  store_cells(dA, parts + at.cell());
  parts[kCells + lane] = dD;
  parts[kCells + kChannels + lane] = dbias;
  if (g.dinitial_state && at.chunk == 0) {
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
#pragma unroll
      for (int i = 0; i < kSide; ++i) {
        if (at.there(s, j, i)) {
          g.dinitial_state[at.batch * s.channel * s.state + at.state(s, j, i)] = gradient[j][i];
        }
      }
    }
  }
}

// --- sums -----------------------------------------------------------------------------------------------------------

struct SumsArguments {
  PlainSums<5> plain;
  // Of parameters, over `rows`; 0: not yet.
  int64_t rows;
  BackwardArguments all;
};

__global__ void __launch_bounds__(kSumThreads) scan_backward_sums_kernel(const SumsArguments a) {
  int64_t index = (int64_t)blockIdx.x * kSumThreads + threadIdx.x;
  if (a.plain.take(index)) return;
  const int64_t row = (int64_t)a.all.columns * kParameters;
  if (index >= row || a.rows == 0) return;
  const int column = (int)(index / kParameters), number = (int)(index % kParameters);
  const bool of_A = number < kCells;
  // Parameters without states stand where state 0 of the channel does.
  const int within = number % kChannels;
  const Cell where = find_cell(a.all, column, of_A ? number : within / kSide * kSide * kSide + within % kSide * kSide * kWarp);
  if (!where.exists) return;
  const float* const from = a.all.parts_parameters + index;
  if (of_A) {
    a.all.g.dA[where.channel * a.all.s.state + where.state] = sum_up(from, a.rows, row);
  } else if (where.state == 0) {
    if (number < kCells + kChannels) {
      a.all.g.dD[where.channel] = sum_up(from, a.rows, row);
    } else {
      // The state blocks of a channel are neighbours.
      float sum = 0.0f;
      for (int i = 0; i < a.all.state_blocks; ++i) sum += sum_up(from + i * kParameters, a.rows, row);
      a.all.g.ddelta_bias[where.channel] = sum;
    }
  }
}

// --- launches -------------------------------------------------------------------------------------------------------

// Where the arrays of the workspace begin, in floats, and where it ends.
struct Workspace {
  int64_t parameters, starts, before, sums, ends, slopes, B, C, series, end;
};

Workspace share_out(const hcmen_scan& s, const BackwardPlan& p) {
  Workspace w{};
  int64_t next = 0;
  const auto take = [&](int64_t floats) {
    const int64_t at = next;
    next += rounded(floats);
    return at;
  };
  const int64_t warps = p.portion * p.columns, projections = p.portion * s.time * s.group * s.state;
  w.parameters = take(s.batch * p.chunks * p.columns * kParameters);
  w.starts = take(warps * p.tiles * kCells);
  if (p.chunks > 1) {
    w.before = take(warps * p.tiles * kChannels);
    w.sums = take(warps * p.chunks * kChannels);
    w.ends = take(warps * p.chunks * kCells);
    w.slopes = take(warps * p.chunks * kCells);
  }
  if (p.channel_blocks > 1) {
    w.B = take(p.channel_blocks * projections);
    w.C = take(p.channel_blocks * projections);
  }
  if (p.state_blocks > 1) w.series = take(3 * p.state_blocks * p.portion * s.time * s.channel);
  w.end = next;
  return w;
}

// `s` and `g` from sequence number `first` on, `count` of them.
hcmen_scan portion_of(const hcmen_scan& s, int64_t first, int64_t count) {
  hcmen_scan out = s;
  const auto ahead = [&](const void* from, int64_t of_one) -> const float* {
    return from ? static_cast<const float*>(from) + first * of_one : nullptr;
  };
  const int64_t series = s.time * s.channel, projections = s.time * s.group * s.state;
  out.batch = count;
  out.u = ahead(s.u, series);
  out.delta = ahead(s.delta, series);
  out.z = ahead(s.z, series);
  out.B = ahead(s.B, projections);
  out.C = ahead(s.C, projections);
  out.initial_state = ahead(s.initial_state, s.channel * s.state);
  out.y = nullptr;
  out.last_state = nullptr;
  return out;
}

hcmen_scan_grad portion_of(const hcmen_scan& s, const hcmen_scan_grad& g, int64_t first) {
  hcmen_scan_grad out = g;
  const int64_t series = first * s.time * s.channel, projections = first * s.time * s.group * s.state;
  const int64_t states = first * s.channel * s.state;
  out.dy = g.dy + series;
  out.du = g.du + series;
  out.ddelta = g.ddelta + series;
  out.dB = g.dB + projections;
  out.dC = g.dC + projections;
  if (g.dz) out.dz = g.dz + series;
  if (g.dlast_state) out.dlast_state = g.dlast_state + states;
  if (g.dinitial_state) out.dinitial_state = g.dinitial_state + states;
  return out;
}

int launch_sums(const SumsArguments& sums, void* stream) {
  const int64_t size = sums.plain.size() + (sums.rows ? sums.all.columns * kParameters : 0);
  if (size == 0) return HCMEN_OK;
  const int64_t blocks = ceil_div(size, kSumThreads);
  return launch(scan_backward_sums_kernel, blocks, kSumThreads, 0, stream, sums);
}

int backward(const hcmen_scan& s, const hcmen_scan_grad& g, const BackwardPlan& plan, const hcmen_cuda_launch& with) {
  float* const memory = static_cast<float*>(with.workspace);
  const Workspace w = share_out(s, plan);
  const bool cut = plan.chunks > 1;
  BackwardArguments a{};
  a.warps = plan.warps;
  a.channel_blocks = (int)plan.channel_blocks;
  a.state_blocks = (int)plan.state_blocks;
  a.tiles = (int)plan.tiles;
  a.chunk_tiles = (int)plan.chunk_tiles;
  a.chunks = (int)plan.chunks;
  a.columns = (int)plan.columns;
  a.group = (int)s.group;
  a.group_channels = (int)(s.channel / s.group);
  a.starts = memory + w.starts;
  a.before = memory + w.before;
  a.sums = memory + w.sums;
  a.ends = memory + w.ends;
  a.slopes = memory + w.slopes;
  const int threads = plan.warps * kWarp;

  for (int64_t first = 0; first < s.batch; first += plan.portion) {
    const int64_t count = s.batch - first < plan.portion ? s.batch - first : plan.portion;
    a.s = portion_of(s, first, count);
    a.series = count * s.time * s.channel;
    const hcmen_scan_grad wanted = portion_of(s, g, first);
    a.g = wanted;
    a.parts_parameters = memory + w.parameters + first * plan.chunks * plan.columns * kParameters;
    const int64_t series = count * s.time * s.channel, projections = count * s.time * s.group * s.state;
    SumsArguments sums{};
    const auto add_up = [&](float* parts, int64_t parts_count, int64_t size, float* to) {
      sums.plain.add({parts, parts_count, size, to});
      return parts;
    };
    a.parts_B = wanted.dB;
    a.parts_C = wanted.dC;
    if (plan.channel_blocks > 1) {
      a.parts_B = add_up(memory + w.B, plan.channel_blocks, projections, wanted.dB);
      a.parts_C = add_up(memory + w.C, plan.channel_blocks, projections, wanted.dC);
    }
    if (plan.state_blocks > 1) {
      float* const parts = memory + w.series;
      const int64_t size = plan.state_blocks * series;
      a.g.du = add_up(parts, plan.state_blocks, series, wanted.du);
      a.g.ddelta = add_up(parts + size, plan.state_blocks, series, wanted.ddelta);
      if (g.dz) a.g.dz = add_up(parts + 2 * size, plan.state_blocks, series, wanted.dz);
    }

    const int64_t blocks = count * plan.columns / plan.warps * plan.chunks, row_bytes = (int64_t)sizeof(float) * kRows * plan.warps;
    const int status =
        cut ? launch(scan_backward_ends_kernel<true>, blocks, threads, (kSeriesRows + 1) * row_bytes, with.stream, a)
            : launch(scan_backward_ends_kernel<false>, blocks, threads, (kInputRows + 1) * row_bytes, with.stream, a);
    if (status) return status;
    if (cut) {
      const int64_t carries = 2 * count * plan.columns * (kCells / kCarryThreads);
      if (const int failure = launch(scan_backward_carries_kernel, carries, kCarryThreads, 0, with.stream, a)) {
        return failure;
      }
    }
    const int64_t bytes = (int64_t)sizeof(float) * kMainRows * plan.warps;
    if (const int failure = launch(scan_backward_kernel, blocks, threads, bytes, with.stream, a)) return failure;

    sums.all = a;
    if (first + count == s.batch) {
      sums.rows = s.batch * plan.chunks;
      sums.all.parts_parameters = memory + w.parameters;
    }
    if (const int failure = launch_sums(sums, with.stream)) return failure;
  }
  return HCMEN_OK;
}

}  // namespace

int load_backward_kernels() {
  return load_kernels(scan_backward_ends_kernel<true>, scan_backward_ends_kernel<false>, scan_backward_carries_kernel,
                      scan_backward_kernel, scan_backward_sums_kernel);
}

int backward_workspace(const hcmen_scan& s, const hcmen_cuda_launch* wish, int64_t* floats) {
  BackwardPlan plan;
  if (const int status = plan_backward(s, wish, &plan)) return status;
  *floats = share_out(s, plan).end;
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
  if (const int status = plan_backward(*scan, launch, &plan)) return status;
  if (const int status = check_workspace(*launch, share_out(*scan, plan).end)) return status;
  return backward(*scan, g, plan, *launch);
}

}  // extern "C"
