// The elementary functions of scan_step.h on a device, at every float32 of size at most 150, against double precision.
//
// Prints JSON: for each function, sign and binade of the argument, the worst and the mean relative error in units of
// 2^-24. A mean far from zero is a bias, which products of many decays add up. Results below 2^-118 are left out: what
// they are made of may come out as zero.
#include <math.h>
#include <stdint.h>
#include <stdio.h>

#include "scan_step.h"

namespace {

struct Errors {
  double worst, worst_at, sum;
  unsigned long long count;
};

constexpr int kThreads = 256, kBlocks = 1024;

template <int kFunction>
__device__ float value(float x) {
  using namespace hcmen::step;
  if (kFunction == 0) return power_of_two(x);
  if (kFunction == 1) return softplus(x);
  return silu(x);
}

template <int kFunction>
__device__ double expected(double x) {
  if (kFunction == 0) return exp2(x);
  if (kFunction == 1) return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x));
  return x / (1 + exp(-x));
}

template <int kFunction>
__global__ void probe_kernel(uint32_t first, uint32_t count, Errors* parts) {
  Errors mine = {};
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += kBlocks * kThreads) {
    const float x = __uint_as_float(first + i);
    if (!(fabsf(x) <= 150.0f)) continue;
    const double want = expected<kFunction>((double)x);
    if (!(fabs(want) >= 0x1p-118)) continue;
    const double error = ((double)value<kFunction>(x) - want) / fabs(want) * 0x1p24;
    if (!(fabs(error) <= mine.worst)) mine.worst = fabs(error), mine.worst_at = x;
    mine.sum += error, ++mine.count;
  }
  __shared__ Errors all[kThreads];
  all[threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads; ++i) {
    if (!(all[i].worst <= mine.worst)) mine.worst = all[i].worst, mine.worst_at = all[i].worst_at;
    mine.sum += all[i].sum, mine.count += all[i].count;
  }
  parts[blockIdx.x] = mine;
}

bool failed(cudaError_t status) {
  if (status == cudaSuccess) return false;
  fprintf(stderr, "CUDA failed: %s\n", cudaGetErrorString(status));
  return true;
}

template <int kFunction>
bool probe(const char* name, bool positive_too, bool last) {
  Errors* parts = nullptr;
  if (failed(cudaMallocHost(&parts, kBlocks * sizeof(Errors)))) return false;
  printf("  \"%s\": [", name);
  bool any = false;
  for (int sign = 1; sign >= (positive_too ? 0 : 1); --sign) {
    for (uint32_t exponent = 1; exponent <= 127 + 7; ++exponent) {
      probe_kernel<kFunction><<<kBlocks, kThreads>>>((uint32_t)sign << 31 | exponent << 23, 1u << 23, parts);
      if (failed(cudaDeviceSynchronize())) return false;
      Errors total = {};
      for (int i = 0; i < kBlocks; ++i) {
        if (!(parts[i].worst <= total.worst)) total.worst = parts[i].worst, total.worst_at = parts[i].worst_at;
        total.sum += parts[i].sum, total.count += parts[i].count;
      }
      if (total.count == 0) continue;
      printf("%s\n    {\"from\": %.9g, \"worst\": %.4f, \"worst_at\": %.9g, \"mean\": %.5f, \"count\": %llu}", any ? "," : "",
             (sign ? -1.0 : 1.0) * ldexp(1.0, (int)exponent - 127), total.worst, total.worst_at,
             total.sum / (double)total.count, total.count);
      any = true;
    }
  }
  printf("\n  ]%s\n", last ? "" : ",");
  return !failed(cudaFreeHost(parts));
}

}  // namespace

int main() {
  printf("{\n  \"unit\": \"2^-24 of the value\",\n");
  if (!probe<0>("decay", false, false) || !probe<1>("softplus", true, false) || !probe<2>("silu", true, true)) return 1;
  printf("}\n");
  return 0;
}
