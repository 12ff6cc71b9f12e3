#include "causal_conv1d.h"

#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <memory>

#include "checks.h"
#include "kernel_table.h"
#include "kernels.h"
#include "parallel.h"

namespace hcmen {
namespace {

int check_sizes(const hcmen_conv& c) {
  if (!all_positive({c.batch, c.time, c.channel, c.width})) return HCMEN_BAD_ARGUMENT;
  if (c.dtype != HCMEN_FLOAT32 && c.dtype != HCMEN_FLOAT16) return HCMEN_BAD_ARGUMENT;
  if (!addressable({c.batch, c.time, c.channel}) || !addressable({c.batch, c.channel, c.width}) ||
      !addressable({kBlockChannels, c.channel, c.width}) || !addressable({c.time, c.width})) {
    return HCMEN_BAD_ARGUMENT;
  }
  if (!c.x || !c.weight || !c.bias || (c.width == 1 && (c.initial_state || c.last_state))) return HCMEN_BAD_ARGUMENT;
  return kernels() ? HCMEN_OK : HCMEN_BAD_ISA;
}

// Steps are shared out: whole rows are contiguous, whatever the number of channels.
struct Plan {
  int64_t steps;  // of a task
  int64_t tasks_per_batch;
  int64_t tasks;
};

// Fewer of them are brief: see parallel.h.
constexpr int64_t kBriefTasks = 8;

Plan plan_forward(const hcmen_conv& c) {
  constexpr int64_t kElements = 32768;  // of a task: some 10 microseconds with silu, 4 without
  Plan plan;
  plan.steps = std::min(c.time, std::max<int64_t>(16, kElements / c.channel));
  plan.tasks_per_batch = (c.time + plan.steps - 1) / plan.steps;
  plan.tasks = c.batch * plan.tasks_per_batch;
  return plan;
}

// Input and output together from which on the caches do not hold them until they are used again, so that the output is
// written past them: three quarters of the last-level cache, as in glibc's memcpy, but no more than a core's share of a
// large one. (A convolution of 512 channels over 8000 steps, 2 x 16 MiB, and the scan that reads its output: 9.8 ms
// through the caches of a Zen 5 core, 9.0 ms past them; over 500 steps, 2 x 1 MiB, the former is faster by 2 %.)
int64_t far_bytes() {
  static const int64_t bytes = [] {
    int64_t cache = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (cache <= 0) cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    constexpr int64_t kMost = 16 << 20;
    return cache <= 0 ? kMost : std::min(cache / 4 * 3, kMost);
  }();
  return bytes;
}

int conv_backward(const hcmen_conv& c, const hcmen_conv_grad& g, int threads) {
  const int64_t blocks = (c.channel + kBlockChannels - 1) / kBlockChannels;
  const int64_t parameters = c.channel * (c.width + 1);
  // dweight and dbias side by side for each batch element; those of the first go where the sum shall be.
  const std::unique_ptr<float, void (*)(void*)> parts(
      (float*)malloc(std::max<size_t>(1, (size_t)((c.batch - 1) * parameters) * sizeof(float))), free);
  if (!parts) return HCMEN_NO_MEMORY;
  const int useful = c.batch * c.time * c.channel < 16384 ? 1 : threads;
  const int status = parallel_tasks(useful, c.batch * blocks, [&](int64_t task) {
    FloatEnvironment environment;
    const int64_t batch = task / blocks, channel = task % blocks * kBlockChannels;
    float* const own = batch > 0 ? parts.get() + (batch - 1) * parameters : nullptr;
    return kernels()->conv_backward(c, g, own ? own : g.dweight, own ? own + c.channel * c.width : g.dbias,
                                    {batch, 0, channel, std::min(kBlockChannels, c.channel - channel)});
  });
  if (status) return status;
  FloatEnvironment environment;
  for (int64_t i = 1; i < c.batch; ++i) {
    const float* part = parts.get() + (i - 1) * parameters;
    kernels()->add(part, g.dweight, c.channel * c.width);
    kernels()->add(part + c.channel * c.width, g.dbias, c.channel);
  }
  return HCMEN_OK;
}

}  // namespace

int conv_forward(const hcmen_conv& conv, const Threads& threads) {
  if (const int status = check_sizes(conv)) return status;
  if (!conv.y) return HCMEN_BAD_ARGUMENT;
  struct Job {
    const hcmen_conv& conv;
    const Plan plan;
    const bool far;
  } job = {conv, plan_forward(conv), conv.batch * conv.time * conv.channel > far_bytes() / 2 / (int64_t)sizeof(float)};
  const auto task = [](void* opaque, int64_t index) {
    FloatEnvironment environment;
    const auto& [conv, plan, far] = *(Job*)opaque;
    const int64_t start = index % plan.tasks_per_batch * plan.steps;
    return kernels()->conv_forward(conv,
                                   {index / plan.tasks_per_batch, start, std::min(plan.steps, conv.time - start), far});
  };
  if (threads.most != 1 && job.plan.tasks > 1) {
    return threads.run(threads.pool, job.plan.tasks, task, &job, job.plan.tasks < kBriefTasks);
  }
  for (int64_t i = 0; i < job.plan.tasks; ++i) {
    if (const int status = task(&job, i)) return status;
  }
  return HCMEN_OK;
}

}  // namespace hcmen

extern "C" {

HCMEN_API int hcmen_causal_conv1d_forward(const hcmen_conv* conv, int threads) {
  if (!conv || threads < 1) return HCMEN_BAD_ARGUMENT;
  return hcmen::conv_forward(*conv, hcmen::own_threads(threads));
}

HCMEN_API int hcmen_causal_conv1d_backward(const hcmen_conv* conv, const hcmen_conv_grad* grad, int threads) {
  if (!conv || !grad || threads < 1) return HCMEN_BAD_ARGUMENT;
  if (const int status = hcmen::check_sizes(*conv)) return status;
  if (conv->dtype != HCMEN_FLOAT32 || !grad->dy || !grad->dx || !grad->dweight || !grad->dbias ||
      (conv->width == 1 && (grad->dlast_state || grad->dinitial_state)) ||
      !hcmen::addressable({conv->batch, conv->channel, conv->width + 1})) {
    return HCMEN_BAD_ARGUMENT;
  }
  return hcmen::conv_backward(*conv, *grad, threads);
}

}  // extern "C"
