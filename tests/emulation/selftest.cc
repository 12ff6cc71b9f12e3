// Kernels with a mistake each, to see that the emulation sees it: selftest race | divergence | shared | right [order]
#include <string>

#include "cuda_emulation.h"

namespace {

constexpr int kThreads = 64;
float result[kThreads];

float* shared() { return ::emulation::block->shared.get(); }

// Each thread reads what its neighbour of the other warp wrote.
__global__ void neighbours(bool barrier) {
  float* const memory = shared();
  memory[threadIdx.x] = (float)threadIdx.x;
  if (barrier) __syncthreads();
  result[threadIdx.x] = memory[threadIdx.x ^ 32];
}

__global__ void divergent() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void beyond() { shared()[threadIdx.x + 1] = 1.0f; }

__global__ void sum_of_lanes() {
  float value = (float)threadIdx.x;
  for (int apart = 1; apart < 32; apart <<= 1) value += __shfl_xor_sync(0xffffffffu, value, apart);
  result[threadIdx.x] = value;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (argc > 2) emulation::order = static_cast<emulation::Order>(atoi(argv[2]));
  const size_t bytes = kThreads * sizeof(float);
  if (what == "race") emulation::launch(1, kThreads, bytes, [] { neighbours(false); });
  if (what == "right") emulation::launch(1, kThreads, bytes, [] { neighbours(true); });
  if (what == "divergence") emulation::launch(1, kThreads, bytes, [] { divergent(); });
  if (what == "shared") emulation::launch(1, kThreads, bytes, [] { beyond(); });
  if (what == "lanes") emulation::launch(1, kThreads, bytes, [] { sum_of_lanes(); });
  for (float x : result) printf("%g ", (double)x);
  printf("\n");
}
