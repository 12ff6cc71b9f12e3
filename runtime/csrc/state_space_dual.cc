#include "state_space_dual.h"

#include <string.h>

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

}  // namespace

int dual_forward(const hcmen_dual& dual, const Threads& threads) {
  if (const int status = check_sizes(dual)) return status;
  if (!dual.y) return HCMEN_BAD_ARGUMENT;
  const auto task = [](void* opaque, int64_t index) {
    FloatEnvironment environment;
    const hcmen_dual& dual = *(const hcmen_dual*)opaque;
    return kernels()->dual_forward(dual, index / dual.head, index % dual.head);
  };
  const int64_t tasks = dual.batch * dual.head;
  if (threads.most != 1 && tasks > 1) return threads.run(threads.pool, tasks, task, (void*)&dual, false);
  for (int64_t i = 0; i < tasks; ++i) {
    if (const int status = task((void*)&dual, i)) return status;
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
