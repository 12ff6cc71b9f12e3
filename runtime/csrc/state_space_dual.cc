#include "state_space_dual.h"

#include <string.h>

#include <algorithm>

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
  int64_t heads, tasks_per_batch;  // heads of a task
  int64_t rows, parts;             // rows of a task; parts of a head, 1 unless heads is 1
  int64_t tasks;

  DualPart at(const hcmen_dual& s, int64_t index) const {
    const int64_t within = index % tasks_per_batch, head = within / parts * heads, row = within % parts * rows;
    return {index / tasks_per_batch, head, std::min(heads, s.head - head), row, std::min(rows, s.head_dim - row)};
  }
};

Plan plan_forward(const hcmen_dual& s) {
  constexpr int64_t kEnoughTasks = 8, kLeastRows = 16;
  const double worth = std::max(1.0, work_of(s) / kLeastWork);
  const int64_t all = s.batch * s.head;
  Plan plan = {1, 0, s.head_dim, 1, 0};
  if (worth < (double)all) {
    plan.heads = std::min(s.head, (all + (int64_t)worth - 1) / (int64_t)worth);
  } else if (all < kEnoughTasks) {
    const int64_t wanted = std::min((kEnoughTasks + all - 1) / all, (int64_t)worth);
    plan.rows = std::max(kLeastRows, (s.head_dim + wanted - 1) / wanted + kLeastRows - 1) / kLeastRows * kLeastRows;
    plan.parts = (s.head_dim + plan.rows - 1) / plan.rows;
  }
  plan.tasks_per_batch = (s.head + plan.heads - 1) / plan.heads * plan.parts;
  plan.tasks = s.batch * plan.tasks_per_batch;
  return plan;
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
  memset(g.dA, 0, (size_t)s.head * sizeof(float));
  memset(g.ddt_bias, 0, (size_t)s.head * sizeof(float));
  memset(g.dD, 0, (size_t)(s.head * (s.wide_D ? s.head_dim : 1)) * sizeof(float));
  memset(g.dB, 0, (size_t)(s.batch * s.time * s.group * s.state) * sizeof(float));
  memset(g.dC, 0, (size_t)(s.batch * s.time * s.group * s.state) * sizeof(float));
  hcmen::FloatEnvironment environment;
  for (int64_t i = 0; i < s.batch * s.head; ++i) {
    if (const int status = hcmen::kernels()->dual_backward(s, g, i / s.head, i % s.head)) return status;
  }
  return HCMEN_OK;
}

}  // extern "C"
