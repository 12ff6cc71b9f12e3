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
#include "state_space_dual_backward.h"

namespace hcmen {
namespace cuda {
namespace {

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

// Back over step k of a tile, number q of kSub, from the states before and after it: `gradient` comes in as that of the
// states after it and goes out as that of those before. Writes parts of the gradients and of y; returns the lane's part
// of decay <gradient, before>.
__device__ __forceinline__ float go_back(const Tile& here, int k, int q, const Cells& after, const Cells& before,
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
  of_rows[Memory::kOutputs + q * kWarp] = sum_of_quad(y, slice);
  const float my_dC = sum_over_quads(dC, quad);
  if (quad & 1) of_states[q * kWarp + kStates] = my_dC;

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
  of_rows[Memory::kThrough + q * kWarp] = sum_of_quad(through, slice);
  const float my_dB = sum_over_quads(dB, quad);
  if (!(quad & 1)) of_states[q * kWarp] = my_dB;
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
      kept[3] = go_back(here, anew_after(last[3][3], sub * kSub + 3), 3, last, fourth, gradient, parts, of_states);
      kept[2] = go_back(here, anew_after(kept[3], sub * kSub + 2), 2, fourth, third, gradient, parts, of_states);
      Cells start, second;
      find_states(a, here, tile, anew_after(kept[2], sub * kSub), start);
      copy_cells(start, second);
      advance_cells(here, sub * kSub, second);
      kept[1] = go_back(here, anew_after(second[3][3], sub * kSub + 1), 1, third, second, gradient, parts, of_states);
      kept[0] = go_back(here, anew_after(kept[1], sub * kSub), 0, second, start, gradient, parts, of_states);
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

struct SumsArguments {
  PlainSums<3> plain;
  // Of parameters, over `rows` sequences and chunks; 0: not yet.
  int64_t rows;
  Arguments all;
};

__global__ void __launch_bounds__(kSumThreads) dual_backward_sums_kernel(const SumsArguments a) {
  int64_t index = (int64_t)blockIdx.x * kSumThreads + threadIdx.x;
  if (a.plain.take(index)) return;
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

int launch_sums(const SumsArguments& sums, void* stream) {
  const hcmen_dual& s = sums.all.s;
  const int64_t size = sums.plain.size() + (sums.rows ? s.head * (2 + (s.wide_D ? s.head_dim : 1)) : 0);
  if (size == 0) return HCMEN_OK;
  return launch(dual_backward_sums_kernel, ceil_div(size, kSumThreads), kSumThreads, 0, stream, sums);
}

int backward(const hcmen_dual& s, const hcmen_dual_grad& g, const DualBackwardPlan& plan, const hcmen_cuda_launch& with) {
  float* const memory = static_cast<float*>(with.workspace);
  const DualWorkspace w = share_out(s, plan);
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
      sums.plain.add({memory + at, parts_count, size, to});
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
  DualBackwardPlan plan;
  if (const int status = plan_backward(*dual, launch, &plan)) return status;
  if (const int status = check_workspace(*launch, share_out(*dual, plan).end)) return status;
  return backward(*dual, g, plan, *launch);
}

}  // extern "C"
