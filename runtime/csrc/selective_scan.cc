#include "selective_scan.h"

#include <stdlib.h>

#include <algorithm>
#include <memory>

#include "checks.h"
#include "kernel_table.h"
#include "kernels.h"
#include "parallel.h"

namespace hcmen {
namespace {

int check_sizes(const hcmen_scan& s) {
  if (!all_positive({s.batch, s.time, s.channel, s.state, s.group})) return HCMEN_BAD_ARGUMENT;
  if (s.channel % s.group != 0) return HCMEN_BAD_ARGUMENT;
  if (s.dtype != HCMEN_FLOAT32 && s.dtype != HCMEN_FLOAT16) return HCMEN_BAD_ARGUMENT;
  // Every array, and every buffer of the kernels, holds fewer elements than one of these.
  if (!addressable({s.batch, s.time, s.channel}) || !addressable({s.batch, s.time, s.group, s.state}) ||
      !addressable({s.batch, s.channel, s.state}) || !addressable({kBlockChannels, s.channel, s.state}) ||
      !addressable({kBlockChannels, s.time, s.state})) {
    return HCMEN_BAD_ARGUMENT;
  }
  if (!s.u || !s.delta || !s.A || !s.B || !s.C || !s.D || !s.delta_bias) return HCMEN_BAD_ARGUMENT;
  return kernels() ? HCMEN_OK : HCMEN_BAD_ISA;
}

// Below this many exponentials (some 10 microseconds) waking another thread costs more than it brings.
constexpr double kLeastWork = 32768;

// How the channels of all batch elements are cut into blocks, and the blocks dealt out to tasks.
struct Plan {
  int64_t block;             // channels of a block; none crosses a group
  int64_t blocks_per_group;  //
  int64_t blocks;            // in all
  int64_t blocks_per_task;
  int64_t tasks;

  ChannelBlock at(const hcmen_scan& s, int64_t index) const {
    const int64_t per_batch = s.group * blocks_per_group, group_channels = s.channel / s.group;
    const int64_t group = index % per_batch / blocks_per_group;
    const int64_t within = index % blocks_per_group * block;
    return {index / per_batch, group, group * group_channels + within, std::min(block, group_channels - within)};
  }
};

Plan plan_forward(const hcmen_scan& s) {
  // Wide blocks read memory best, many blocks share out best.
  constexpr int64_t kEnoughBlocks = 8, kLeastChannels = 16;
  const int64_t group_channels = s.channel / s.group;
  Plan plan;
  plan.block = kBlockChannels;
  for (;;) {
    plan.blocks_per_group = (group_channels + plan.block - 1) / plan.block;
    plan.blocks = s.batch * s.group * plan.blocks_per_group;
    if (plan.blocks >= kEnoughBlocks || plan.block <= kLeastChannels) break;
    plan.block /= 2;
  }
  const double work = (double)s.batch * (double)s.channel * (double)s.time * (double)s.state;
  const double worth = std::max(1.0, std::min(work / kLeastWork, (double)plan.blocks));
  plan.blocks_per_task = (plan.blocks + (int64_t)worth - 1) / (int64_t)worth;
  plan.tasks = (plan.blocks + plan.blocks_per_task - 1) / plan.blocks_per_task;
  return plan;
}

int check_gradients(const hcmen_scan& s, const hcmen_scan_grad& g) {
  if (s.dtype != HCMEN_FLOAT32) return HCMEN_BAD_ARGUMENT;
  if (!g.dy || !g.du || !g.ddelta || !g.dA || !g.dB || !g.dC || !g.dD || !g.ddelta_bias) return HCMEN_BAD_ARGUMENT;
  if ((g.dz == nullptr) != (s.z == nullptr)) return HCMEN_BAD_ARGUMENT;
  // The partial sums below: a dA, dD and ddelta_bias for each batch element, a dB and dC for each block of channels.
  const int64_t blocks = (s.channel / s.group + kBlockChannels - 1) / kBlockChannels;
  if (!addressable({s.batch, s.channel, s.state + 2}) || !addressable({blocks, s.batch, s.time, s.group, s.state, 2})) {
    return HCMEN_BAD_ARGUMENT;
  }
  return HCMEN_OK;
}

struct Free {
  void operator()(float* p) const { free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

Buffer allocate(int64_t count) { return Buffer((float*)malloc(std::max<size_t>(1, (size_t)count * sizeof(float)))); }

// to += parts[0] + parts[1] + ..., one part after the other whatever the number of threads.
void add_parts(int threads, const float* parts, int64_t count, int64_t size, float* to) {
  constexpr int64_t kPiece = 4096;
  parallel_tasks(threads, (size + kPiece - 1) / kPiece, [&](int64_t task) {
    FloatEnvironment environment;
    const int64_t start = task * kPiece, length = std::min(kPiece, size - start);
    for (int64_t i = 0; i < count; ++i) kernels()->add(parts + i * size + start, to + start, length);
    return HCMEN_OK;
  });
}

int scan_backward(const hcmen_scan& s, const hcmen_scan_grad& g, int threads) {
  const int64_t group_channels = s.channel / s.group;
  const int64_t blocks = (group_channels + kBlockChannels - 1) / kBlockChannels;  // of one group
  const int64_t groups = s.batch * s.group;
  const int64_t row = s.group * s.state, projection = s.batch * s.time * row;
  const int64_t parameters = s.channel * (s.state + 2);

  // Whole groups as tasks need no partial sums of dB and dC; the numbers are the same either way, since both add the
  // blocks of a group in order.
  const bool by_group = blocks == 1 || threads == 1 || groups >= 4 * (int64_t)threads;
  Buffer parts_BC = allocate(by_group ? 0 : 2 * (blocks - 1) * projection);
  Buffer parts_parameters = allocate((s.batch - 1) * parameters);
  if (!parts_BC || !parts_parameters) return HCMEN_NO_MEMORY;
  float* parts_B = parts_BC.get();
  float* parts_C = parts_B + (by_group ? 0 : (blocks - 1) * projection);
  // dA, dD and ddelta_bias side by side for each batch element; those of the first go where the sum shall be.
  float* const parts_A = parts_parameters.get();

  const auto run_block = [&](int64_t group_index, int64_t block) {
    const int64_t batch = group_index / s.group, group = group_index % s.group;
    const int64_t channel = group * group_channels + block * kBlockChannels;
    const bool apart = !by_group && block > 0;
    const int64_t offset = batch * s.time * row + group * s.state + (apart ? (block - 1) * projection : 0);
    float* const own = batch > 0 ? parts_A + (batch - 1) * parameters : nullptr;
    const ScanGradTargets targets = {
        (apart ? parts_B : g.dB) + offset,
        (apart ? parts_C : g.dC) + offset,
        row,
        by_group && block > 0,
        own ? own : g.dA,
        own ? own + s.channel * s.state : g.dD,
        own ? own + s.channel * (s.state + 1) : g.ddelta_bias,
    };
    const ChannelBlock channels = {batch, group, channel,
                                   std::min(kBlockChannels, group_channels - block * kBlockChannels)};
    return kernels()->scan_backward(s, g, targets, channels);
  };

  const int64_t tasks = by_group ? groups : groups * blocks;
  const double work = (double)s.batch * (double)s.channel * (double)s.time * (double)s.state;
  const int useful = work < kLeastWork ? 1 : threads;
  const int status = parallel_tasks(useful, tasks, [&](int64_t task) {
    FloatEnvironment environment;
    if (!by_group) return run_block(task / blocks, task % blocks);
    for (int64_t block = 0; block < blocks; ++block) {
      if (const int failure = run_block(task, block)) return failure;
    }
    return (int)HCMEN_OK;
  });
  if (status) return status;

  if (!by_group) {
    add_parts(useful, parts_B, blocks - 1, projection, g.dB);
    add_parts(useful, parts_C, blocks - 1, projection, g.dC);
  }
  FloatEnvironment environment;
  for (int64_t i = 1; i < s.batch; ++i) {
    const float* part = parts_A + (i - 1) * parameters;
    kernels()->add(part, g.dA, s.channel * s.state);
    kernels()->add(part + s.channel * s.state, g.dD, s.channel);
    kernels()->add(part + s.channel * (s.state + 1), g.ddelta_bias, s.channel);
  }
  return HCMEN_OK;
}

}  // namespace

int scan_forward_check(const hcmen_scan& scan) {
  if (const int status = check_sizes(scan)) return status;
  return scan.y ? HCMEN_OK : HCMEN_BAD_ARGUMENT;
}

int64_t scan_forward_tasks(const hcmen_scan& scan) { return plan_forward(scan).tasks; }

int scan_forward_task(const hcmen_scan& scan, int64_t task) {
  FloatEnvironment environment;
  const Plan plan = plan_forward(scan);
  const int64_t last = std::min(plan.blocks, (task + 1) * plan.blocks_per_task);
  for (int64_t i = task * plan.blocks_per_task; i < last; ++i) {
    const ChannelBlock block = plan.at(scan, i);
    const int64_t states = (block.batch * scan.channel + block.channel) * scan.state;
    const TimeSpan whole = {0, scan.time, scan.initial_state ? scan.initial_state + states : nullptr,
                            scan.last_state ? scan.last_state + states : nullptr};
    if (const int status = kernels()->scan_forward(scan, block, whole)) return status;
  }
  return HCMEN_OK;
}

}  // namespace hcmen

extern "C" {

HCMEN_API int hcmen_selective_scan_forward(const hcmen_scan* scan, int threads) {
  if (!scan || threads < 1) return HCMEN_BAD_ARGUMENT;
  if (const int status = hcmen::scan_forward_check(*scan)) return status;
  return hcmen::parallel_tasks(threads, hcmen::scan_forward_tasks(*scan),
                               [&](int64_t task) { return hcmen::scan_forward_task(*scan, task); });
}

HCMEN_API int hcmen_selective_scan_backward(const hcmen_scan* scan, const hcmen_scan_grad* grad, int threads) {
  if (!scan || !grad || threads < 1) return HCMEN_BAD_ARGUMENT;
  if (const int status = hcmen::check_sizes(*scan)) return status;
  if (const int status = hcmen::check_gradients(*scan, *grad)) return status;
  return hcmen::scan_backward(*scan, *grad, threads);
}

HCMEN_API int hcmen_ops_version(void) { return HCMEN_OPS_VERSION; }

HCMEN_API const char* hcmen_ops_isa(void) {
  const hcmen::KernelTable* table = hcmen::kernels();
  return table ? table->name : nullptr;
}

HCMEN_API const char* hcmen_ops_problem(void) { return hcmen::kernels_problem(); }

HCMEN_API int64_t hcmen_exp_loop(int64_t rounds) {
  const hcmen::KernelTable* table = hcmen::kernels();
  return table ? table->exp_loop(rounds) : 0;
}

HCMEN_API int hcmen_evaluate(int function, const float* x, float* y, int64_t count) {
  if (!x || !y || count < 0 || function < 0 || function > 5) return HCMEN_BAD_ARGUMENT;
  const hcmen::KernelTable* table = hcmen::kernels();
  if (!table) return HCMEN_BAD_ISA;
  table->evaluate(function, x, y, count);
  return HCMEN_OK;
}

}  // extern "C"
