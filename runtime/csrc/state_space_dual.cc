#include "state_space_dual.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <thread>

#include "checks.h"
#include "kernel_table.h"
#include "kernels.h"
#include "parallel.h"

namespace hcmen {
namespace {

int check_sizes(const hcmen_dual& s) {
  if (!all_positive({s.batch, s.time, s.head, s.head_dim, s.group, s.state})) return HCMEN_BAD_ARGUMENT;
  if (s.head % s.group != 0 || !(s.dt_min <= s.dt_max)) return HCMEN_BAD_ARGUMENT;
  if (s.dtype != HCMEN_FLOAT32 && s.dtype != HCMEN_FLOAT16) return HCMEN_BAD_ARGUMENT;
  // Every array, and every buffer of the kernels, holds fewer elements than one of these.
  if (!addressable({s.batch, s.time, s.head, s.head_dim}) || !addressable({s.batch, s.time, s.group, s.state}) ||
      !addressable({s.batch, s.head, s.head_dim, s.state}) || !addressable({s.time + 2, s.head_dim, s.state})) {
    return HCMEN_BAD_ARGUMENT;
  }
  if (!s.x || !s.dt || !s.A || !s.B || !s.C || !s.D || !s.dt_bias) return HCMEN_BAD_ARGUMENT;
  return kernels() ? HCMEN_OK : HCMEN_BAD_ISA;
}

// Below this many updates of a state (some 7 microseconds) sharing costs more than it brings even where threads are awake.
constexpr double kLeastWork = 131072;
// Below this many it is brief: see parallel.h.
constexpr double kBriefWork = 2097152;

double work_of(const hcmen_dual& s) {
  return (double)s.batch * (double)s.head * (double)s.time * (double)s.head_dim * (double)s.state;
}

// How heads, and where they are few the rows of their states, are dealt out to tasks.
struct Plan {
  int64_t shares;       // of the heads of a batch element, one a task
  int64_t rows, parts;  // rows of a task; parts of a head, 1 unless a share is one head
  int64_t tasks;

  DualPart at(const hcmen_dual& s, int64_t index) const {
    const int64_t within = index % (shares * parts), share = within / parts, row = within % parts * rows;
    const int64_t head = share * s.head / shares, end = (share + 1) * s.head / shares;
    return {index / (shares * parts), head, end - head, row, std::min(rows, s.head_dim - row)};
  }
};

// Tasks that keep all threads busy, of which ONNX Runtime does not tell the number.
int64_t enough_tasks() {
  static const int64_t enough = std::max<int64_t>(8, std::thread::hardware_concurrency());
  return enough;
}

Plan plan_forward(const hcmen_dual& s) {
  constexpr int64_t kFewTasks = 8, kLeastRows = 16;
  const double worth = std::max(1.0, work_of(s) / kLeastWork);
  const int64_t all = s.batch * s.head;
  Plan plan = {s.head, s.head_dim, 1, 0};
  // Heads side by side read longer runs of memory: three of 24 at a time take 6 to 14 % less than one.
  const int64_t most = all < 2 * enough_tasks() ? all : enough_tasks();
  const int64_t wanted = std::min((int64_t)worth, most);
  if (wanted < all) {
    plan.shares = std::min(s.head, (wanted + s.batch - 1) / s.batch);
  } else if (all < kFewTasks) {
    const int64_t parts = std::min((kFewTasks + all - 1) / all, (int64_t)worth);
    plan.rows = std::max(kLeastRows, (s.head_dim + parts - 1) / parts + kLeastRows - 1) / kLeastRows * kLeastRows;
    plan.parts = (s.head_dim + plan.rows - 1) / plan.rows;
  }
  plan.tasks = s.batch * plan.shares * plan.parts;
  return plan;
}

struct Free {
  void operator()(float* p) const { free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

Buffer allocate(int64_t count) { return Buffer((float*)malloc(std::max<size_t>(1, (size_t)count * sizeof(float)))); }

// Heads of a group add to the same dB and dC: each computes its own, which are added in their order, some heads at a time.
int dual_backward(const hcmen_dual& s, const hcmen_dual_grad& g, int threads) {
  constexpr int64_t kSlice = 64;  // steps that a task adds up
  const int64_t groups = s.batch * s.group, per_group = s.head / s.group;
  const int64_t row = (s.state + kDualPadding - 1) / kDualPadding * kDualPadding, series = s.time * row;
  const int64_t dim = s.wide_D ? s.head_dim : 1, parameters = s.head * (dim + 2);
  const int useful = work_of(s) < kLeastWork ? 1 : threads;
  // As many heads of each group as make all threads busy.
  const int64_t at_once = std::min(per_group, (useful + groups - 1) / groups);
  // dA, ddt_bias and dD side by side for each batch element.
  const Buffer sums = allocate(s.batch * parameters), parts = allocate(groups * at_once * 2 * series);
  if (!sums || !parts) return HCMEN_NO_MEMORY;
  const auto part = [&](int64_t group, int64_t i) { return parts.get() + (group * at_once + i) * 2 * series; };
  memset(g.dB, 0, (size_t)(groups * s.time * s.state) * sizeof(float));
  memset(g.dC, 0, (size_t)(groups * s.time * s.state) * sizeof(float));
  for (int64_t first = 0; first < per_group; first += at_once) {
    const int64_t heads = std::min(at_once, per_group - first);
    const int status = parallel_tasks(useful, groups * heads, [&](int64_t task) {
      FloatEnvironment environment;
      const int64_t index = task / heads, batch = index / s.group, head = index % s.group * per_group + first + task % heads;
      float *const own = part(index, task % heads), *const sum = sums.get() + batch * parameters;
      const DualGradTargets to = {own, own + series, sum + 2 * s.head + head * dim, sum + head, sum + s.head + head};
      return kernels()->dual_backward(s, g, to, batch, head);
    });
    if (status) return status;
    const int64_t slices = (s.time + kSlice - 1) / kSlice;
    parallel_tasks(useful, groups * slices, [&](int64_t task) {
      FloatEnvironment environment;
      const int64_t index = task / slices, batch = index / s.group, group = index % s.group;
      const int64_t from = task % slices * kSlice, to = std::min(s.time, from + kSlice);
      for (int64_t i = 0; i < heads; ++i) {
        const float* const own = part(index, i);
        for (int64_t t = from; t < to; ++t) {
          const int64_t at = ((batch * s.time + t) * s.group + group) * s.state;
          kernels()->add(own + t * row, g.dB + at, s.state);
          kernels()->add(own + series + t * row, g.dC + at, s.state);
        }
      }
      return (int)HCMEN_OK;
    });
  }
  FloatEnvironment environment;
  for (int64_t batch = 0; batch < s.batch; ++batch) {
    const float* const sum = sums.get() + batch * parameters;
    const struct {
      float* to;
      const float* from;
      int64_t count;
    } each[] = {{g.dA, sum, s.head}, {g.ddt_bias, sum + s.head, s.head}, {g.dD, sum + 2 * s.head, s.head * dim}};
    for (const auto& one : each) {
      if (batch == 0) {
        memcpy(one.to, one.from, (size_t)one.count * sizeof(float));
      } else {
        kernels()->add(one.from, one.to, one.count);
      }
    }
  }
  return HCMEN_OK;
}

}  // namespace

int dual_forward(const hcmen_dual& dual, const Threads& threads) {
  if (const int status = check_sizes(dual)) return status;
  if (!dual.y) return HCMEN_BAD_ARGUMENT;
  struct Job {
    const hcmen_dual& dual;
    const Plan plan;
  } job = {dual, plan_forward(dual)};
  const auto task = [](void* opaque, int64_t index) {
    FloatEnvironment environment;
    const auto& [dual, plan] = *(Job*)opaque;
    return kernels()->dual_forward(dual, plan.at(dual, index));
  };
  if (threads.most != 1 && job.plan.tasks > 1) {
    return threads.run(threads.pool, job.plan.tasks, task, &job, work_of(dual) < kBriefWork);
  }
  for (int64_t batch = 0; batch < dual.batch; ++batch) {
    FloatEnvironment environment;
    const DualPart whole = {batch, 0, dual.head, 0, dual.head_dim};
    if (const int status = kernels()->dual_forward(dual, whole)) return status;
  }
  return HCMEN_OK;
}

}  // namespace hcmen

extern "C" {

HCMEN_API int hcmen_state_space_dual_forward(const hcmen_dual* dual, int threads) {
  if (!dual || threads < 1) return HCMEN_BAD_ARGUMENT;
  return hcmen::dual_forward(*dual, hcmen::own_threads(threads));
}

HCMEN_API int hcmen_state_space_dual_backward(const hcmen_dual* dual, const hcmen_dual_grad* grad, int threads) {
  if (!dual || !grad || threads < 1) return HCMEN_BAD_ARGUMENT;
  const hcmen_dual& s = *dual;
  const hcmen_dual_grad& g = *grad;
  if (const int status = hcmen::check_sizes(s)) return status;
  if (s.dtype != HCMEN_FLOAT32 || !g.dy || !g.dx || !g.ddt || !g.dA || !g.dB || !g.dC || !g.dD || !g.ddt_bias ||
      (g.dz == nullptr) != (s.z == nullptr)) {
    return HCMEN_BAD_ARGUMENT;
  }
  return hcmen::dual_backward(s, g, threads);
}

}  // extern "C"
