// One table of kernels per instruction set, and the choice between them. Internal.
#ifndef HCMEN_KERNEL_TABLE_H_
#define HCMEN_KERNEL_TABLE_H_

#include <stdint.h>

#include "causal_conv1d.h"
#include "selective_scan.h"
#include "state_space_dual.h"

namespace hcmen {

// Channels [channel, channel + count) of one batch element; all of them use the same group.
struct ChannelBlock {
  int64_t batch, group, channel, count;
};

// Steps [start, start + count) of a scan, counted in scanning order. The states of a block of channels before and after
// them, [channel of the block, state]: null for zeros, and for states that nobody wants.
struct TimeSpan {
  int64_t start, count;
  const float* initial_state;
  float* last_state;
};

// Steps [time, time + count) of one batch element, all channels. far: no cache will hold the output until it is used.
struct TimeBlock {
  int64_t batch, time, count;
  bool far;
};

// Heads [head, head + heads) of one batch element, rows [row, row + rows) of the states of each.
struct DualPart {
  int64_t batch, head, heads, row, rows;
};

// The most channels of a block: of forward tasks, and of one round of the backward pass.
constexpr int64_t kBlockChannels = 64;

// What a backward task writes: slices of the caller's gradients, or partial sums that are added up in a fixed order
// afterwards. Strides are counted in elements.
struct ScanGradTargets {
  float* dB;  // this block's share of dB and dC for its batch element: [time, group, state] from `group` on, rows
  float* dC;  // `row` elements apart
  int64_t row;
  bool accumulate;     // add to dB and dC (the blocks of one group run in order) instead of overwriting
  float* dA;           // [channel, state] of this batch element's share, all channels
  float* dD;           // [channel]
  float* ddelta_bias;  // [channel]
};

// What a head has alone of gradients that are sums, all overwritten.
struct DualGradTargets {
  float *dB, *dC;              // [time, state], rows padded to a multiple of kDualPadding
  float *dD, *dA, *ddt_bias;  // of this head
};
constexpr int64_t kDualPadding = 16;

struct KernelTable {
  const char* name;
  // Each returns HCMEN_OK or HCMEN_NO_MEMORY.
  int (*scan_forward)(const hcmen_scan&, const ChannelBlock&, const TimeSpan&);
  int (*scan_backward)(const hcmen_scan&, const hcmen_scan_grad&, const ScanGradTargets&, const ChannelBlock&);
  int (*conv_forward)(const hcmen_conv&, const TimeBlock&);
  // dweight [channel, width] and dbias [channel]: this batch element's share.
  int (*conv_backward)(const hcmen_conv&, const hcmen_conv_grad&, float* dweight, float* dbias, const ChannelBlock&);
  int (*dual_forward)(const hcmen_dual&, const DualPart&);
  // One head of one batch element: all its gradients, but those that are sums over heads or batch elements.
  int (*dual_backward)(const hcmen_dual&, const hcmen_dual_grad&, const DualGradTargets&, int64_t batch, int64_t head);
  // to[i] += from[i]
  void (*add)(const float* from, float* to, int64_t count);
  // Computes rounds * (return value / rounds) exponentials as the scan does, in registers; returns their number.
  int64_t (*exp_loop)(int64_t rounds);
  // y[i] = f(x[i]) for tests: 0 exponential, 1 softplus, 2 silu, 3 sigmoid, 4 2^x as the scan computes it, 5 the same
  // without range checks.
  void (*evaluate)(int function, const float* x, float* y, int64_t count);
};

extern const KernelTable kBaselineKernels;
#if defined(HCMEN_WITH_X86_KERNELS)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#endif

// The table of this machine, or of the level that the environment variable HCMEN_ISA names, read once; null if that
// name is unknown or the machine cannot run it, and then `kernels_problem` says what is wrong.
const KernelTable* kernels();
const char* kernels_problem();

// For tests: the tables that this machine can run, best first, counted from 0; null after the last.
const KernelTable* kernels_at(int index);

// While it lives the calling thread computes in a floating-point environment of our own: round to nearest, exceptions
// masked, subnormals flushed to zero (a state that decays through silence would otherwise crawl through subnormals at
// a hundredth of the speed). The thread's own environment is back when it goes.
class FloatEnvironment {
 public:
  FloatEnvironment();
  ~FloatEnvironment();
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
  uint64_t saved_;
};

}  // namespace hcmen

#endif  // HCMEN_KERNEL_TABLE_H_
