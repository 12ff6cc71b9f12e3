// What the backward passes of the selective scan and of the state space dual share: how they cut sequences, and sums in
// a fixed order. Internal.
#ifndef HCMEN_CUDA_BACKWARD_H_
#define HCMEN_CUDA_BACKWARD_H_

#include "cuda_launch.h"

namespace hcmen {
namespace cuda {

// How many times the states of a warp are kept at once, unless a single sequence needs more: 4 GiB.
constexpr double kMostStarts = 1 << 21;

struct BackwardCut {
  int64_t tiles, chunk_tiles, chunks;  // of a sequence; of a chunk; of a sequence
  int64_t portion;                     // sequences that are under way together
};

// columns: warps that a sequence takes. tile: its steps. enough: warps that a device shall have to do. `wish` may be null.
inline int cut_backward(int64_t batch, int64_t time, int64_t columns, int tile, int64_t enough,
                        const hcmen_cuda_launch* wish, BackwardCut* cut) {
  const int64_t wished = wish ? wish->steps_per_chunk : 0, at_once = wish ? wish->sequences_at_once : 0;
  if (wished < -1 || at_once < 0) return HCMEN_BAD_ARGUMENT;
  BackwardCut c{};
  c.tiles = ceil_div(time, tile);
  const double warps = (double)batch * (double)columns, starts = (double)c.tiles * (double)columns;

  c.chunk_tiles = c.tiles;
  if (wished > 0) {
    c.chunk_tiles = wished < time ? ceil_div(wished, tile) : c.tiles;
  } else if (wished == 0 && warps < (double)enough && c.tiles > 1) {
    // At once if a few chunks do, else in two turns, which waste less of the last.
    const int64_t have = (int64_t)warps;
    c.chunk_tiles = ceil_div(c.tiles, (4 * have <= enough ? 1 : 2) * enough / have);
  }
  c.chunks = ceil_div(c.tiles, c.chunk_tiles);

  // What a warp keeps is numbered in 32 bits, as blocks are; past these no device has the memory.
  if (const int status = check_blocks(starts > warps * (double)c.chunks ? starts : warps * (double)c.chunks)) return status;
  const double most = kMostStarts / starts;
  c.portion = most < 1.0 ? 1 : most > (double)batch ? batch : (int64_t)most;
  if (at_once > 0 && c.portion > at_once) c.portion = at_once;
  // Portions of equal size.
  c.portion = ceil_div(batch, ceil_div(batch, c.portion));
  *cut = c;
  return HCMEN_OK;
}

// --- sums over lanes ------------------------------------------------------------------------------------------------

// Of sums over the lanes of a quad of four values: the one whose number is the lane's slice.
__device__ __forceinline__ float sum_of_quad(const float (&values)[4], int slice) {
  const bool second = slice & 2, odd = slice & 1;
  float low = second ? values[2] : values[0], high = second ? values[3] : values[1];
  low += __shfl_xor_sync(kAllLanes, second ? values[0] : values[2], 2);
  high += __shfl_xor_sync(kAllLanes, second ? values[1] : values[3], 2);
  return (odd ? high : low) + __shfl_xor_sync(kAllLanes, odd ? low : high, 1);
}

// Of sums over quads of four values of each slice: the one whose number is quad / 2.
__device__ __forceinline__ float sum_over_quads(const float (&values)[4], int quad) {
  const bool second = quad & 4, odd = quad & 2;
  float low = second ? values[2] : values[0], high = second ? values[3] : values[1];
  low += __shfl_xor_sync(kAllLanes, second ? values[0] : values[2], 16);
  high += __shfl_xor_sync(kAllLanes, second ? values[1] : values[3], 16);
  const float sum = (odd ? high : low) + __shfl_xor_sync(kAllLanes, odd ? low : high, 8);
  return sum + __shfl_xor_sync(kAllLanes, sum, 4);
}

// --- sums of partial sums -------------------------------------------------------------------------------------------

constexpr int kSumThreads = 128;

__device__ __forceinline__ float sum_up(const float* from, int64_t count, int64_t apart) {
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t i = 0; i < count; ++i) sum += from[i * apart];
  return sum;
}

// Sums of `count` arrays of `size` floats that lie `size` apart.
struct PlainSum {
  const float* parts;
  int64_t count, size;
  float* to;
};

template <int kMost>
struct PlainSums {
  PlainSum all[kMost];
  int count;

  void add(const PlainSum& one) { all[count++] = one; }
  int64_t size() const {
    int64_t total = 0;
    for (int i = 0; i < count; ++i) total += all[i].size;
    return total;
  }
  // Takes the sum whose number is `index`, else makes `index` that of what follows the plain sums.
  __device__ __forceinline__ bool take(int64_t& index) const {
    for (int i = 0; i < count; ++i) {
      const PlainSum& one = all[i];
      if (index < one.size) {
        one.to[index] = sum_up(one.parts + index, one.count, one.size);
        return true;
      }
      index -= one.size;
    }
    return false;
  }
};

}  // namespace cuda
}  // namespace hcmen

#endif  // HCMEN_CUDA_BACKWARD_H_
