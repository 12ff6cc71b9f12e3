// The state space dual on a CUDA device. The arithmetic is in scan_step.h, how work is shared out in
// state_space_dual_plan.cu; here it is done.
//
// A lane holds kDualRows rows of a head and some states of each. The lanes that share these rows are neighbours, as are
// the vectors of four states that they hold: lane `slice` has those numbered slice, slice + lanes, slice + 2 lanes, ...
// A head has one step size and one decay at each step, so a block computes them once, when it puts them, x, B and C into
// shared memory. What a tile of steps needs is read while the tile before it is scanned, into registers, and put into a
// second buffer.
//
// A warp takes its steps in rounds of kRound. Each lane sums C h over its own states, for four rows of four steps. Then
// lanes exchange halves of these sixteen sums until each has the whole of some, adds D x to those, applies the gate and
// writes them.
//
// A long sequence at a small batch gives too few blocks. It is cut into chunks, as the selective scan is: a first launch
// finds what each chunk but the last makes of a zero state, a second one walks over these and leaves the states that each
// chunk starts from, a third one computes outputs, all chunks at once.
//
// What lies past an end (of time, rows, states) counts as zero, with a decay of one. Row groups past the last work on
// nothing and write nothing.
#include "state_space_dual_tile.h"

namespace hcmen {
namespace cuda {
namespace {

enum Mode {
  kOutputs,  // y, and the last state
  kChunks,   // what a chunk makes of a zero state
};

constexpr int kSums = kRound * kDualRows;  // of a lane in a round

// --- a round --------------------------------------------------------------------------------------------------------

// Advances the states over a round's steps. B, x, decays: where the lane's own begin in shared memory. With kY `sums` gets
// [step][row] of C h, over the lane's own states; else `steps` the sum of the step sizes.
template <int kStates, bool kY>
__device__ __forceinline__ void scan_round(const float* B, const float* x, const float* decays,
                                           States<kStates>& state, float (&sums)[kSums], float& steps) {
#pragma unroll
  for (int j = 0; j < kRound; ++j) {
    float pair[4], input[kDualRows];
    load(decays + j / 2 * 4, pair);
    load(x + j * kDualRows, input);
    const float d = pair[j % 2 * 2], decay = pair[j % 2 * 2 + 1];
    if (!kY) steps += d;
#pragma unroll
    for (int r = 0; r < kDualRows; ++r) {
      input[r] *= d;
      if (kY) sums[j * kDualRows + r] = 0.0f;
    }
#pragma unroll
    for (int p = 0; p < kStates; p += 4) {
      float my_B[4], my_C[4];
      load(B + 2 * j * kStates + p, my_B);
      if (kY) load(B + (2 * j + 1) * kStates + p, my_C);
#pragma unroll
      for (int r = 0; r < kDualRows; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& h = state.h[r][p + i];
          h = fmaf(decay, h, input[r] * my_B[i]);
          if (kY) sums[j * kDualRows + r] = fmaf(my_C[i], h, sums[j * kDualRows + r]);
        }
      }
    }
  }
}

// Of kCount sums of each of two lanes the first half, or in an `upper` lane the second, over both lanes.
template <int kCount>
__device__ __forceinline__ void halve(float (&sums)[kSums], bool upper, int apart) {
#pragma unroll
  for (int q = 0; q < kCount / 2; ++q) {
    const float sent = upper ? sums[q] : sums[q + kCount / 2];
    sums[q] = (upper ? sums[q + kCount / 2] : sums[q]) + __shfl_xor_sync(kAllLanes, sent, apart);
  }
}

// Which of a round's sums a lane has in the end: `count` from `first` on, numbered as [step][row].
struct Own {
  int first, count;
  bool writes;

  __device__ __forceinline__ Own(int slice, int shift)
      : first((slice & 1) * 8 + (slice & 2) * 2 + (slice & 4) / 2 + (slice & 8) / 8),
        count(kSums >> (shift < 4 ? shift : 4)),
        writes(slice < kSums) {}
};

__device__ __forceinline__ void share_sums(float (&sums)[kSums], int slice, int shift) {
  if (shift > 0) halve<16>(sums, slice & 1, 1);
  if (shift > 1) halve<8>(sums, slice & 2, 2);
  if (shift > 2) halve<4>(sums, slice & 4, 4);
  if (shift > 3) halve<2>(sums, slice & 8, 8);
  if (shift > 4) sums[0] += __shfl_xor_sync(kAllLanes, sums[0], 16);
}

// --- kernels --------------------------------------------------------------------------------------------------------

// z of so many sums is read ahead: all that a lane has where four lanes or more share a row.
constexpr int kGatesAhead = 4;

constexpr int kThreads = kMostDualWarps * kWarp;
// Blocks of a multiprocessor at least, which leaves 168 registers; 64 states of a lane need more.
constexpr int blocks_at_once(int states) { return states == 16 ? 2 : 3; }

template <class T, int kStates, int kMode>
__global__ void __launch_bounds__(kThreads, blocks_at_once(kStates)) dual_forward_kernel(const Arguments a) {
  const hcmen_dual& s = a.s;
  const DualLayout& plan = a.plan;
  const int64_t starts = plan.chunks - 1;  // chunks that another one follows
  const Spot at = find_spot(s, plan, kMode == kChunks ? starts : plan.chunks);
  const int lanes = plan.lanes(), slice = threadIdx.x & (lanes - 1), my_group = threadIdx.x >> plan.lanes_shift;
  const Rows rows = find_rows(s, plan, at, my_group);
  const int64_t begin = at.chunk * plan.chunk;
  const int count = (int)(s.time - begin < plan.chunk ? s.time - begin : plan.chunk);  // steps
  const int tile = plan.steps;

  int64_t row = row_of(s, at, begin);  // of the tile
  int* const table = Staging<T>::table();
  if (threadIdx.x == 0) {
    table[0] = at.group;
    table[1] = at.first_head;
  }
  for (int i = threadIdx.x; i < plan.block_groups(); i += blockDim.x) {
    const Rows r = find_rows(s, plan, at, i);
    table[4 + 2 * i] = r.head * (int)s.head_dim + r.first;
    table[5 + 2 * i] = r.count;
  }
  __syncthreads();
  Staging<T> staging(a);
  staging.begin();
  staging.fetch(row, count);

  States<kStates> state;
  const int64_t my_states = (at.batch * s.head + rows.head) * s.head_dim * s.state;
  if (kMode != kChunks && at.chunk > 0) {
    const int64_t row = (at.batch * starts + at.chunk - 1) * s.head + rows.head;
    state.read(a.ends + row * s.head_dim * s.state, s, rows, slice, lanes, a.four);
  } else if (kMode != kChunks && s.initial_state) {
    state.read(s.initial_state + my_states, s, rows, slice, lanes, a.four);
  } else {
    state.clear();
  }

  // The lane's own outputs: of which step of a round, and from which row on.
  const Own own(slice, plan.lanes_shift);
  const int own_step = own.first / kDualRows, own_row = own.first % kDualRows;
  int live = own.writes ? rows.count - own_row : 0;  // of the rows from there on
  float D[kDualRows];
#pragma unroll
  for (int r = 0; r < kDualRows; ++r) {
    const bool there = kMode == kOutputs && r < live;
    D[r] = there ? s.D[s.wide_D ? (int64_t)rows.head * s.head_dim + rows.first + own_row + r : rows.head] : 0.0f;
  }
  const int first_element =
      (s.reverse ? -own_step : own_step) * a.input_step + rows.head * (int)s.head_dim + rows.first + own_row;
  const T* const z = static_cast<const T*>(s.z);
  T* const y = static_cast<T*>(s.y);
  float steps = 0.0f;

  float* buffer = shared_memory() + plan.table();
  float* other = buffer + plan.buffer();
  staging.put(row, count, buffer);
  __syncthreads();

  for (int done = 0; done < count; done += tile) {
    const int remaining = count - done;
    const int64_t next = row + (s.reverse ? -tile : tile);
    if (remaining > tile) staging.fetch(next, remaining - tile);
    const int here = remaining < tile ? remaining : tile;
    const float* B = buffer + slice * plan.lane_stride();
    const float* x = buffer + plan.rounds() * plan.projections() + my_group * kDualRowStride;
    const float* decays = buffer + plan.rounds() * (plan.projections() + plan.inputs()) + rows.head_here * 2 * kRound;
    for (int k = 0; k < here; k += kRound) {
      const int left = remaining - k;
      const int64_t element = row * a.input_step + (first_element + (s.reverse ? -k : k) * a.input_step);
      T gates[kGatesAhead];
      if (kMode == kOutputs && s.z) {
#pragma unroll
        for (int q = 0; q < kGatesAhead; ++q) {
          gates[q] = q < own.count && q < live && own_step < left ? z[element + q] : T{};
        }
      }
      float sums[kSums];
      scan_round<kStates, kMode == kOutputs>(B, x, decays, state, sums, steps);
      if (kMode == kOutputs) {
        share_sums(sums, slice, plan.lanes_shift);
        const auto finish = [&](int q) {
          const int step = q / kDualRows, row = q % kDualRows;
          if (q >= own.count || row >= live || own_step + step >= left) return;
          const int64_t place = element + (s.reverse ? -step : step) * a.input_step + row;
          float out = fmaf(D[row], x[(own_step + step) * kDualRows + own_row + row], sums[q]);
          if (s.z) out *= step::silu(widened(q < kGatesAhead ? gates[q] : z[place]));
          narrow(out, y + place);
        };
#pragma unroll
        for (int q = 0; q < kGatesAhead; ++q) finish(q);
        if (own.count > kGatesAhead) {
#pragma unroll
          for (int q = kGatesAhead; q < kSums; ++q) finish(q);
        }
      }
      B += plan.projections();
      x += plan.inputs();
      decays += plan.decays();
    }
    if (remaining > tile) {
      staging.put(next, remaining - tile, other);
      row = next;
      float* const swap = buffer;
      buffer = other;
      other = swap;
      __syncthreads();
    }
  }

  // Found again, not kept until here.
  const Spot end = find_spot(s, plan, kMode == kChunks ? starts : plan.chunks);
  const Rows last = find_rows(s, plan, end, anew((int)threadIdx.x) >> plan.lanes_shift);
  const int64_t size = s.head_dim * s.state;
  if (kMode == kChunks) {
    const int64_t kept = (end.batch * starts + end.chunk) * s.head + last.head;
    state.write(a.ends + kept * size, s, last, slice, lanes, a.four);
    if (last.count > 0 && last.first == 0 && slice == 0) a.sums[kept] = steps;
  }
  if (kMode == kOutputs && s.last_state && end.chunk == starts) {
    state.write(s.last_state + (end.batch * s.head + last.head) * size, s, last, slice, lanes, a.four);
  }
}

// Ends of chunks from a zero state -> states after the chunks. One thread for each (batch, head, row, state).
constexpr int kCarryThreads = 64;
// As of the selective scan: a store may lie where the next load does, so several are read before the first is used.
constexpr int kCarriedAtOnce = 8;

__global__ void __launch_bounds__(kCarryThreads) dual_carry_kernel(const Arguments a) {
  const hcmen_dual& s = a.s;
  const int64_t index = (int64_t)blockIdx.x * kCarryThreads + threadIdx.x, size = s.head_dim * s.state;
  if (index >= s.batch * s.head * size) return;
  const int64_t row = index / size, batch = row / s.head, head = row % s.head, cell = index % size;
  const float A = s.A[head];
  float state = s.initial_state ? s.initial_state[index] : 0.0f;
  const int64_t starts = a.plan.chunks - 1, stride = s.head * size;
  float* ends = a.ends + (batch * starts * s.head + head) * size + cell;
  const float* sums = a.sums + batch * starts * s.head + head;
  for (int64_t j = 0; j < starts; j += kCarriedAtOnce) {
    float end[kCarriedAtOnce], sum[kCarriedAtOnce];
#pragma unroll
    for (int q = 0; q < kCarriedAtOnce; ++q) {
      const bool there = j + q < starts;
      end[q] = there ? ends[q * stride] : 0.0f;
      sum[q] = there ? sums[q * s.head] : 0.0f;
    }
#pragma unroll
    for (int q = 0; q < kCarriedAtOnce; ++q) {
      if (j + q >= starts) break;
      state = fmaf(step::decay(sum[q], A), state, end[q]);
      ends[q * stride] = state;
    }
    ends += kCarriedAtOnce * stride;
    sums += kCarriedAtOnce * s.head;
  }
}

// --- launches -------------------------------------------------------------------------------------------------------

using Kernel = void (*)(Arguments);

template <class T, int kMode>
Kernel forward_kernel(int states) {
  return states == 4   ? dual_forward_kernel<T, 4, kMode>
         : states == 8 ? dual_forward_kernel<T, 8, kMode>
                       : dual_forward_kernel<T, 16, kMode>;
}

int launch_dual(Kernel kernel, const Arguments& a, int64_t chunks, void* stream) {
  const int64_t blocks = a.s.batch * a.s.group * a.plan.row_blocks * chunks;
  return launch(kernel, blocks, a.plan.threads(), a.plan.shared_bytes(), stream, a);
}

template <class T>
int forward(const hcmen_dual& s, const DualLayout& plan, const hcmen_cuda_launch& with) {
  constexpr int64_t kVector = 4 * sizeof(T);
  Arguments a{};
  a.s = s;
  a.plan = plan;
  a.four = s.state % 4 == 0 && aligned(s.B, kVector) && aligned(s.C, kVector) && aligned(s.initial_state, 16) &&
           aligned(s.last_state, 16);
  a.projection_step = (int)(s.group * s.state);
  a.input_step = (int)(s.head * s.head_dim);
  a.four_inputs = s.head_dim % 4 == 0 && aligned(s.x, kVector);
  a.ends = static_cast<float*>(with.workspace);
  a.sums = a.ends + rounded(s.batch * (plan.chunks - 1) * s.head * s.head_dim * s.state);
  if (plan.chunks > 1) {
    if (const int status = launch_dual(forward_kernel<T, kChunks>(plan.states), a, plan.chunks - 1, with.stream)) {
      return status;
    }
    const int64_t blocks = ceil_div(s.batch * s.head * s.head_dim * s.state, kCarryThreads);
    if (const int status = launch(dual_carry_kernel, blocks, kCarryThreads, 0, with.stream, a)) return status;
  }
  return launch_dual(forward_kernel<T, kOutputs>(plan.states), a, plan.chunks, with.stream);
}

template <class T>
int load_kernels_of() {
  for (int states : {4, 8, 16}) {
    if (const int status = load_kernels(forward_kernel<T, kOutputs>(states), forward_kernel<T, kChunks>(states))) {
      return status;
    }
  }
  return HCMEN_OK;
}

}  // namespace

int load_dual_forward_kernels() {
  if (const int status = load_kernel(dual_carry_kernel)) return status;
  if (const int status = load_kernels_of<float>()) return status;
  return load_kernels_of<__half>();
}

}  // namespace cuda
}  // namespace hcmen

extern "C" {

HCMEN_API int hcmen_cuda_state_space_dual_forward(const hcmen_dual* dual, const hcmen_cuda_launch* launch) {
  using namespace hcmen::cuda;
  if (!dual || !launch) return HCMEN_BAD_ARGUMENT;
  if (const int status = check_sizes(*dual, HCMEN_CUDA_FORWARD_STATES)) return status;
  if (const int status = check_inputs(*dual)) return status;
  if (!dual->y) return HCMEN_BAD_ARGUMENT;
  DualLayout plan;
  if (const int status = plan_forward(*dual, launch, &plan)) return status;
  if (const int status = check_workspace(*launch, forward_floats(*dual, plan))) return status;
  return dual->dtype == HCMEN_FLOAT16 ? forward<__half>(*dual, plan, *launch) : forward<float>(*dual, plan, *launch);
}

}  // extern "C"
