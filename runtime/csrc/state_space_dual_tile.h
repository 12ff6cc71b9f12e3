// Where a block of the forward state space dual lies in the arrays, how a tile of steps comes into shared memory, and
// states into registers. Included by state_space_dual.cu alone.
#ifndef HCMEN_STATE_SPACE_DUAL_TILE_H_
#define HCMEN_STATE_SPACE_DUAL_TILE_H_

#include "state_space_dual_cuda.h"

namespace hcmen {
namespace cuda {
namespace {

struct Arguments {
  hcmen_dual s;
  DualLayout plan;
  bool four;         // whether states, B and C allow loads of four elements at once
  bool four_inputs;  // whether x does
  int projection_step, input_step;  // elements from one step in time to the next, of B and C and of x
  float* ends;       // [batch, chunks - 1, head, head_dim, state]
  float* sums;       // [batch, chunks - 1, head]
};

// --- places ---------------------------------------------------------------------------------------------------------

// The place of a block in the arrays.
struct Spot {
  int64_t batch, chunk;
  int group;        // of B and C
  int first_group;  // row group, among those of all heads of the group
  int first_head;   // of the block, among all
  int heads;        // of the group
};

__device__ __forceinline__ Spot find_spot(const hcmen_dual& s, const DualLayout& plan, int64_t chunks) {
  unsigned index = anew((int)blockIdx.x);
  Spot p;
  const unsigned block = index % (unsigned)plan.row_blocks;
  index /= (unsigned)plan.row_blocks;
  p.group = (int)(index % (unsigned)s.group);
  index /= (unsigned)s.group;
  p.chunk = index % (unsigned)chunks;
  p.batch = index / (unsigned)chunks;
  p.heads = (int)((unsigned)s.head / (unsigned)s.group);
  p.first_group = (int)block << plan.block_groups_shift();
  p.first_head = p.group * p.heads + p.first_group / plan.head_groups;
  return p;
}

// A row group of a block.
struct Rows {
  int head;         // among all
  int head_here;    // among those of the block
  int first;        // row of the head
  int count;        // rows that exist: 0 for a group past the last one
};

__device__ __forceinline__ Rows find_rows(const hcmen_dual& s, const DualLayout& plan, const Spot& at, int group) {
  const unsigned number = at.first_group + group, head = number / (unsigned)plan.head_groups;
  Rows r;
  const bool there = head < (unsigned)at.heads;
  r.head = there ? at.group * at.heads + (int)head : at.first_head;
  r.head_here = r.head - at.first_head;
  r.first = there ? (int)(number - head * plan.head_groups) * kDualRows : 0;
  const int left = (int)s.head_dim - r.first;
  r.count = !there ? 0 : left < kDualRows ? left : kDualRows;
  return r;
}

// The step scanned as number `index`, counted over all sequences.
__device__ __forceinline__ int64_t row_of(const hcmen_dual& s, const Spot& at, int64_t index) {
  return at.batch * s.time + step::place(index, s.time, s.reverse);
}

// --- a tile's inputs ------------------------------------------------------------------------------------------------

// A tile's inputs on their way into shared memory. Each thread takes some ahead, where vectors can be read: vectors of B
// and C, one of x, one step size. What that leaves is read when it is put there.
constexpr int kVectorsAhead = 2;

template <class T>
struct Staging {
  static constexpr int kNever = INT32_MIN;

  const Arguments& a;
  const hcmen_dual& s;
  const DualLayout& plan;
  // Where this thread's items lie, from the first element of a tile's first step on; or kNever.
  int projections[kVectorsAhead], input, dt;
  int dt_step, dt_place;
  Four<T> read_projections[kVectorsAhead], read_input;
  T read_dt;
  float bias, A;  // of the head of `dt`

  __device__ __forceinline__ Staging(const Arguments& arguments) : a(arguments), s(a.s), plan(a.plan) {}

  // After the block's table is there.
  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int q = 0; q < kVectorsAhead; ++q) {
      int n;
      projections[q] = projection(threadIdx.x + q * plan.threads(), n);
      if (n >= s.state || !a.four) projections[q] = kNever;
    }
    int count, head;
    input = rows(threadIdx.x, count);
    if (count == 0 || !a.four_inputs) input = kNever;
    dt_step = (unsigned)threadIdx.x / (unsigned)plan.block_heads;
    dt = raw_step(threadIdx.x, dt_step, head);
    dt_place = place_of_step(threadIdx.x, dt_step);
    if (head >= s.head) dt = kNever;
    bias = head < s.head ? s.dt_bias[head] : 0.0f;
    A = head < s.head ? s.A[head] : 0.0f;
  }

  // Reads this thread's part of the tile whose first step is `row`, see row_of, and that has `steps` steps.
  __device__ __forceinline__ void fetch(int64_t row, int steps) {
    const int thread = anew((int)threadIdx.x);
#pragma unroll
    for (int q = 0; q < kVectorsAhead; ++q) {
      const int i = thread + q * plan.threads();
      const bool there = projections[q] != kNever && step_of_vector(i) < steps;
      read_projections[q] = there ? *vector(projection_row(i, row) + projections[q]) : Four<T>{};
    }
    read_input = input != kNever && step_of_rows(thread) < steps ? *vector(input_row(row) + input) : Four<T>{};
    read_dt = dt != kNever && dt_step < steps ? step_row(row)[dt] : T{};
  }

  // Puts the tile that was fetched last into `buffer`.
  __device__ __forceinline__ void put(int64_t row, int steps, float* buffer) const {
    const int thread = anew((int)threadIdx.x), threads = plan.threads();
    int i = thread;
    if (a.four) {
#pragma unroll
      for (int q = 0; q < kVectorsAhead; ++q, i += threads) {
        if (i < vectors()) put_vector(read_projections[q], buffer + place_of_vector(i));
      }
    }
#pragma unroll 1
    for (; i < vectors(); i += threads) {
      int n;
      const T* const from = projection_row(i, row) + projection(i, n);
      put_vector(some(from, a.four, step_of_vector(i) < steps ? (int)s.state - n : 0), buffer + place_of_vector(i));
    }
    buffer += plan.rounds() * plan.projections();
    i = thread;
    if (a.four_inputs) {
      if (i < row_groups()) put_vector(read_input, buffer + place_of_rows(i));
      i += threads;
    }
#pragma unroll 1
    for (; i < row_groups(); i += threads) {
      int count;
      const T* const from = input_row(row) + rows(i, count);
      put_vector(some(from, a.four_inputs, step_of_rows(i) < steps ? count : 0), buffer + place_of_rows(i));
    }
    buffer += plan.rounds() * plan.inputs();
    if (thread < decays()) put_step(read_dt, dt != kNever && dt_step < steps, bias, A, buffer + dt_place);
#pragma unroll 1
    for (i = thread + threads; i < decays(); i += threads) {
      int head;
      const int step = (unsigned)i / (unsigned)plan.block_heads, offset = raw_step(i, step, head);
      const bool there = head < s.head && step < steps;
      put_step(there ? step_row(row)[offset] : T{}, there, there ? s.dt_bias[head] : 0.0f,
               there ? s.A[head] : 0.0f, buffer + place_of_step(i, step));
    }
  }

  // The table of the block: see DualLayout::table.
  static __device__ __forceinline__ int* table() { return reinterpret_cast<int*>(shared_memory()); }

 private:
  // How much there is of each in a tile; where number i goes in shared memory.
  __device__ __forceinline__ int vectors_shift() const { return plan.lanes_shift + plan.states / 8; }
  __device__ __forceinline__ int vectors() const { return 2 * plan.steps << vectors_shift(); }
  __device__ __forceinline__ int step_of_vector(int i) const { return i >> (vectors_shift() + 1); }
  __device__ __forceinline__ int step_of_rows(int i) const { return i >> plan.block_groups_shift(); }
  __device__ __forceinline__ int row_groups() const { return plan.steps << plan.block_groups_shift(); }
  __device__ __forceinline__ int decays() const { return plan.steps * plan.block_heads; }

  __device__ __forceinline__ int place_of_vector(int i) const {
    const int line = i >> vectors_shift(), number = i - (line << vectors_shift()), slice = number & (plan.lanes() - 1);
    const int round = line / (2 * kRound), of_round = line % (2 * kRound);
    return ((round << plan.lanes_shift) + slice) * plan.lane_stride() + of_round * plan.states +
           (number >> plan.lanes_shift) * 4;
  }
  __device__ __forceinline__ int place_of_rows(int i) const {
    const int step = step_of_rows(i), group = i & (plan.block_groups() - 1);
    return ((step / kRound << plan.block_groups_shift()) + group) * kDualRowStride + step % kRound * kDualRows;
  }
  __device__ __forceinline__ int place_of_step(int i, int step) const {
    const int head = i - step * plan.block_heads;
    return step / kRound * plan.decays() + (head * kRound + step % kRound) * 2;
  }

  __device__ __forceinline__ const T* projection_row(int i, int64_t row) const {
    return static_cast<const T*>(i >> vectors_shift() & 1 ? s.C : s.B) + row * a.projection_step;
  }
  __device__ __forceinline__ const T* input_row(int64_t row) const {
    return static_cast<const T*>(s.x) + row * a.input_step;
  }
  __device__ __forceinline__ const T* step_row(int64_t row) const { return static_cast<const T*>(s.dt) + row * (int)s.head; }

  // Where it lies from the tile's first step on: vector number i of [step][B, C][vector], whose first state is `n`;
  __device__ __forceinline__ int projection(int i, int& n) const {
    n = (i & ((1 << vectors_shift()) - 1)) * 4;
    return onward(step_of_vector(i)) * a.projection_step + table()[0] * (int)s.state + n;
  }
  // the rows number i of [step][row group], `count` of them;
  __device__ __forceinline__ int rows(int i, int& count) const {
    const int* const entry = table() + 4 + 2 * (i & (plan.block_groups() - 1));
    count = entry[1];
    return onward(step_of_rows(i)) * a.input_step + entry[0];
  }
  // number i of [step][head of the block], of `head`, which may be past the last.
  __device__ __forceinline__ int raw_step(int i, int step, int& head) const {
    head = table()[1] + i - step * plan.block_heads;
    return onward(step) * (int)s.head + head;
  }

  // So many steps on, in memory.
  __device__ __forceinline__ int onward(int steps) const { return s.reverse ? -steps : steps; }

  static __device__ __forceinline__ const Four<T>* vector(const T* from) { return reinterpret_cast<const Four<T>*>(from); }

  // The first `count` elements of four, or fewer; with `whole` all of them or none.
  static __device__ __forceinline__ Four<T> some(const T* from, bool whole, int count) {
    Four<T> out{};
    if (count <= 0) return out;
    if (whole) return *vector(from);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e < count) out.at[e] = from[e];
    }
    return out;
  }

  static __device__ __forceinline__ void put_vector(const Four<T>& x, float* to) {
    float wide[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) wide[e] = widened(x.at[e]);
    store(wide, to);
  }

  __device__ __forceinline__ void put_step(T dt, bool there, float bias, float A, float* to) const {
    const float d = there ? dual_step(s, widened(dt), bias).size : 0.0f;
    to[0] = d;
    to[1] = step::decay(d, A);
  }
};

// --- states ---------------------------------------------------------------------------------------------------------

// A lane's states in [head_dim, state] arrays, `from` at the head's first row.
template <int kStates>
struct States {
  float h[kDualRows][kStates];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kDualRows; ++r) {
#pragma unroll
      for (int p = 0; p < kStates; ++p) h[r][p] = 0.0f;
    }
  }

  __device__ __forceinline__ void read(const float* from, const hcmen_dual& s, const Rows& rows, int slice, int lanes,
                                       bool four) {
#pragma unroll
    for (int r = 0; r < kDualRows; ++r) {
#pragma unroll
      for (int p = 0; p < kStates; p += 4) {
        const int n = (p / 4 * lanes + slice) * 4;
        float some[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        const float* const place = from + (rows.first + r) * s.state + n;
        if (r < rows.count && four) {
          if (n < s.state) load(place, some);
        } else if (r < rows.count) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (n + i < s.state) some[i] = place[i];
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) h[r][p + i] = some[i];
      }
    }
  }

  __device__ __forceinline__ void write(float* to, const hcmen_dual& s, const Rows& rows, int slice, int lanes,
                                        bool four) const {
#pragma unroll
    for (int r = 0; r < kDualRows; ++r) {
      if (r >= rows.count) break;
#pragma unroll
      for (int p = 0; p < kStates; p += 4) {
        const int n = (p / 4 * lanes + slice) * 4;
        float* const place = to + (rows.first + r) * s.state + n;
        if (four) {
          const float some[4] = {h[r][p], h[r][p + 1], h[r][p + 2], h[r][p + 3]};
          if (n < s.state) store(some, place);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (n + i < s.state) place[i] = h[r][p + i];
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace cuda
}  // namespace hcmen

#endif  // HCMEN_STATE_SPACE_DUAL_TILE_H_
