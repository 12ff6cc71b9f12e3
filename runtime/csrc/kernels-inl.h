// The table of the instruction set that the including file is compiled for.
#ifndef HCMEN_KERNELS_INL_H_
#define HCMEN_KERNELS_INL_H_

#include "causal_conv1d-inl.h"
#include "selective_scan-inl.h"
#include "selective_scan_backward-inl.h"
#include "state_space_dual-inl.h"
#include "state_space_dual_backward-inl.h"

namespace hcmen {
namespace HCMEN_ISA_NAMESPACE {

static void add(const float* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(to + i) + load(from + i));
  for (; i < count; ++i) to[i] += from[i];
}

// Has the value computed and does nothing with it.
HCMEN_INLINE void keep(F x) {
#if defined(__SSE2__)
  __asm__ volatile("" : : "v"(x));
#elif defined(__aarch64__)
  __asm__ volatile("" : : "w"(x));
#else
  __asm__ volatile("" : : "m"(x));
#endif
}

// 8 vectors per round, all in registers; what the scan would do with them at its best. 4, 12 and 16 vectors were not
// faster, and a sum over them instead of nothing at all was slower by 10 to 30 %.
static int64_t exp_loop(int64_t rounds) {
  constexpr int kVectors = 8;
  F rate[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    for (int j = 0; j < kLanes; ++j) rate[i][j] = -1.0f - 0.01f * (float)(i * kLanes + j);
  }
  F d = {};
  for (int64_t k = 0; k < rounds; ++k) {
    d = k % 1024 ? d + 0.001f : F{};
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) keep(exp2_product<false>(d, rate[i]));
  }
  return rounds * kVectors * kLanes;
}

static void evaluate(int function, const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = count - i < kLanes ? (int)(count - i) : kLanes;
    const F in = load(x + i, lanes);
    F out = {};
    switch (function) {
      case 0: out = exponential(in); break;
      case 1: out = softplus(in); break;
      case 2: out = silu(in); break;
      case 3: out = sigmoid(in); break;
      case 4: out = exp2_product<true>(in, splat(1.0f)); break;
      case 5: out = exp2_product<false>(in, splat(1.0f)); break;
    }
    store(y + i, out, lanes);
  }
}

}  // namespace HCMEN_ISA_NAMESPACE

extern const KernelTable HCMEN_ISA_TABLE = {
    HCMEN_ISA_NAME,
    HCMEN_ISA_NAMESPACE::scan_forward,
    HCMEN_ISA_NAMESPACE::scan_backward,
    HCMEN_ISA_NAMESPACE::conv_forward,
    HCMEN_ISA_NAMESPACE::conv_backward,
    HCMEN_ISA_NAMESPACE::dual_forward,
    HCMEN_ISA_NAMESPACE::dual_backward,
    HCMEN_ISA_NAMESPACE::add,
    HCMEN_ISA_NAMESPACE::exp_loop,
    HCMEN_ISA_NAMESPACE::evaluate,
};

}  // namespace hcmen

#endif  // HCMEN_KERNELS_INL_H_
