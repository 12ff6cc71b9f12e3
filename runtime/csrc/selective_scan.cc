#include "selective_scan.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

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

// Below this many exponentials (some 7 microseconds) sharing costs more than it brings even where threads are awake.
constexpr double kLeastWork = 32768;
// Below this many it is brief: see parallel.h.
constexpr double kBriefWork = 524288;

double work_of(const hcmen_scan& s) {
  return (double)s.batch * (double)s.channel * (double)s.time * (double)s.state;
}

// How the channels of all batch elements are cut into blocks, the blocks dealt out to tasks, and, where channels are few
// and the time is long, each block into segments of time.
struct Plan {
  int64_t block;             // channels of a block; none crosses a group
  int64_t blocks_per_group;  //
  int64_t blocks;            // in all
  int64_t blocks_per_task;
  int64_t tasks;
  int64_t segments;  // of a block; above 1, every segment is a task

  ChannelBlock at(const hcmen_scan& s, int64_t index) const {
    const int64_t per_batch = s.group * blocks_per_group, group_channels = s.channel / s.group;
    const int64_t group = index % per_batch / blocks_per_group;
    const int64_t within = index % blocks_per_group * block;
    return {index / per_batch, group, group * group_channels + within, std::min(block, group_channels - within)};
  }
};

// Segments are cut into pieces, at whose ends states are recorded.
constexpr int64_t kPiece = 512, kLeastSegment = 8 * kPiece;

// Steps that the blocks of a task take one after the other, where they go through time together.
constexpr int64_t kTogether = 128;

// Whether the arrays are too long for the caches. A block of channels reads a part of each row alone, and what a row's
// other blocks need of the same pages has gone when they come: 50,000 steps of 256 channels took twice as long a step as
// 500. So the blocks of a task go through time together, some rows at a time.
bool outgrows_caches(const hcmen_scan& s) {
  constexpr int64_t kCached = 1 << 20;  // elements of u, delta, z and y together: 4 MiB of float32
  return s.time > kTogether && s.time * s.channel > kCached / 4;
}

Plan plan_forward(const hcmen_scan& s, int threads) {
  // Wide blocks read memory best, many blocks share out best.
  constexpr int64_t kEnoughTasks = 8, kLeastChannels = 16;
  const int64_t group_channels = s.channel / s.group;
  Plan plan;
  plan.block = kBlockChannels;
  for (;;) {
    plan.blocks_per_group = (group_channels + plan.block - 1) / plan.block;
    plan.blocks = s.batch * s.group * plan.blocks_per_group;
    if (plan.blocks >= kEnoughTasks || plan.block <= kLeastChannels) break;
    plan.block /= 2;
  }
  const double worth = std::max(1.0, std::min(work_of(s) / kLeastWork, (double)plan.blocks));
  plan.blocks_per_task = (plan.blocks + (int64_t)worth - 1) / (int64_t)worth;
  plan.tasks = (plan.blocks + plan.blocks_per_task - 1) / plan.blocks_per_task;
  const int64_t wanted = threads ? threads : kEnoughTasks;
  if (threads && outgrows_caches(s)) {
    plan.blocks_per_task = std::max(plan.blocks_per_task, plan.blocks / threads);
    plan.tasks = (plan.blocks + plan.blocks_per_task - 1) / plan.blocks_per_task;
  }
  plan.segments = std::max<int64_t>(1, std::min((wanted + plan.blocks - 1) / plan.blocks, s.time / kLeastSegment));
  return plan;
}

const float* states_of(const float* all, const hcmen_scan& s, const ChannelBlock& block) {
  return all ? all + (block.batch * s.channel + block.channel) * s.state : nullptr;
}

struct Free {
  void operator()(float* p) const { free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

Buffer allocate(int64_t count) { return Buffer((float*)malloc(std::max<size_t>(1, (size_t)count * sizeof(float)))); }

// Blocks [first, last), some rows of all of them at a time.
int scan_together(const hcmen_scan& s, const Plan& plan, int64_t first, int64_t last) {
  const int64_t width = plan.block * s.state;
  const Buffer states = allocate((last - first) * width);
  if (!states) return HCMEN_NO_MEMORY;
  for (int64_t start = 0; start < s.time; start += kTogether) {
    const int64_t count = std::min(kTogether, s.time - start);
    for (int64_t i = first; i < last; ++i) {
      const ChannelBlock block = plan.at(s, i);
      float* const own = states.get() + (i - first) * width;
      float* const wanted = (float*)states_of(s.last_state, s, block);
      const TimeSpan span = {start, count, start ? own : states_of(s.initial_state, s, block),
                             start + count < s.time ? own : wanted};
      if (const int status = kernels()->scan_forward(s, block, span)) return status;
    }
  }
  return HCMEN_OK;
}

// --- a scan cut in time ---------------------------------------------------------------------------------------------
//
// A segment needs the states at its start, which the segment before it ends with. It does not wait for them: if they
// are not there yet it begins with zeros, and is mended afterwards. States forget how they began, and in float32 they
// forget it entirely: after some steps (about 20 / (d |A|) of the slowest state) both runs have the same bits, and
// what follows is as if it had begun rightly. So a mender starts from the true states at the start of the segment, writes
// over what was made there, and stops at the first piece that ends with the recorded bits. The result is the serial
// one to the last bit, whatever the number of threads.
//
// Where nothing is forgotten (rates near 0), the menders go through everything, one after the other, and the whole takes
// as long as on one thread, not longer: all that was wasted ran beside the first segment. A thread that comes to a
// segment whose forerunner is done begins rightly, so that a single one wastes nothing.

class TimeCut {
 public:
  TimeCut(const hcmen_scan& scan, const Plan& plan)
      : s_(scan), plan_(plan), pieces_((scan.time + kPiece - 1) / kPiece), width_(plan.block * scan.state) {
    const int64_t tasks = plan.blocks * plan.segments;
    records_ = allocate((plan.blocks * pieces_ + 2 * tasks) * width_);
    marks_.reset(new (std::nothrow) Mark[(size_t)tasks]);
  }

  bool works() const { return records_ && marks_; }

  int run(const Threads& threads) {
    const int64_t tasks = plan_.blocks * plan_.segments;
    const auto step = [](void* self, int64_t index) { return ((TimeCut*)self)->begin(index); };
    if (const int status = threads.run(threads.pool, tasks, step, this, false)) return status;
    int64_t seams = 0;
    for (int64_t i = 0; i < tasks; ++i) {
      if (!marks_[i].seam) continue;
      // A mender of the segment before may write over what this one starts from.
      memcpy(start(i), record(i - 1, end_of(i - 1) - 1), (size_t)width_ * sizeof(float));
      ++seams;
    }
    if (seams > 1) {
      const auto mend = [](void* self, int64_t index) { return ((TimeCut*)self)->mend(index); };
      if (const int status = threads.run(threads.pool, tasks, mend, this, false)) return status;
    } else {
      for (int64_t i = 0; i < tasks; ++i) {
        if (const int status = mend(i)) return status;
      }
    }
    // Where states had still not met at the end of a segment, the next one was mended from the wrong ones, or not at all.
    for (int64_t i = 0; i < tasks; ++i) {
      if (!marks_[i].apart || (i + 1) % plan_.segments == 0) continue;
      marks_[i + 1].apart = false;
      marks_[i + 1].seam = true;
      memcpy(start(i + 1), record(i, end_of(i) - 1), (size_t)width_ * sizeof(float));
      if (const int status = mend(i + 1)) return status;
    }
    if (s_.last_state) {
      for (int64_t b = 0; b < plan_.blocks; ++b) {
        const ChannelBlock block = plan_.at(s_, b);
        memcpy((float*)states_of(s_.last_state, s_, block), record(b * plan_.segments, pieces_ - 1),
               (size_t)(block.count * s_.state) * sizeof(float));
      }
    }
    return HCMEN_OK;
  }

 private:
  struct Mark {
    std::atomic<bool> done{false};
    bool seam = false;   // begun with zeros for want of better
    bool apart = false;  // ends with other states than it was recorded to
  };

  // Pieces of segment `index` of all, within its block.
  int64_t begin_of(int64_t index) const { return index % plan_.segments * pieces_ / plan_.segments; }
  int64_t end_of(int64_t index) const { return (index % plan_.segments + 1) * pieces_ / plan_.segments; }

  // The states after a piece of the block that a segment belongs to; what a mender of the segment starts from; and the
  // states it has come to.
  float* record(int64_t index, int64_t piece) const {
    return records_.get() + (index / plan_.segments * pieces_ + piece) * width_;
  }
  float* start(int64_t index) const { return records_.get() + (plan_.blocks * pieces_ + 2 * index) * width_; }
  float* reached(int64_t index) const { return start(index) + width_; }

  int scan_piece(int64_t index, int64_t piece, const float* from, float* to) const {
    FloatEnvironment environment;
    const int64_t first = piece * kPiece;
    return kernels()->scan_forward(s_, plan_.at(s_, index / plan_.segments),
                                   {first, std::min(kPiece, s_.time - first), from, to});
  }

  int begin(int64_t index) {
    Mark& mark = marks_[index];
    const float* from = nullptr;
    if (index % plan_.segments == 0) {
      from = states_of(s_.initial_state, s_, plan_.at(s_, index / plan_.segments));
    } else if (marks_[index - 1].done.load(std::memory_order_acquire)) {
      from = record(index, begin_of(index) - 1);
    } else {
      mark.seam = true;
    }
    for (int64_t piece = begin_of(index); piece < end_of(index); ++piece) {
      if (const int status = scan_piece(index, piece, from, record(index, piece))) return status;
      from = record(index, piece);
    }
    mark.done.store(true, std::memory_order_release);
    return HCMEN_OK;
  }

  int mend(int64_t index) {
    if (!marks_[index].seam) return HCMEN_OK;
    const size_t bytes = (size_t)(plan_.at(s_, index / plan_.segments).count * s_.state) * sizeof(float);
    const float* from = start(index);
    for (int64_t piece = begin_of(index); piece < end_of(index); ++piece) {
      float* const now = reached(index);
      if (const int status = scan_piece(index, piece, from, now)) return status;
      if (memcmp(now, record(index, piece), bytes) == 0) return HCMEN_OK;
      memcpy(record(index, piece), now, bytes);
      from = record(index, piece);
    }
    marks_[index].apart = true;
    return HCMEN_OK;
  }

  const hcmen_scan& s_;
  const Plan& plan_;
  const int64_t pieces_, width_;
  Buffer records_;
  std::unique_ptr<Mark[]> marks_;
};

int check_forward(const hcmen_scan& scan) {
  if (const int status = check_sizes(scan)) return status;
  return scan.y ? HCMEN_OK : HCMEN_BAD_ARGUMENT;
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
  const int useful = work_of(s) < kLeastWork ? 1 : threads;
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

int scan_forward(const hcmen_scan& scan, const Threads& threads) {
  if (const int status = check_forward(scan)) return status;
  struct Job {
    const hcmen_scan& scan;
    const Plan plan;
  } job = {scan, plan_forward(scan, threads.most)};
  if (threads.most != 1 && job.plan.segments > 1) {
    TimeCut cut(scan, job.plan);
    if (cut.works()) return cut.run(threads);
    // Without memory for its records, as it stands.
  }
  const auto task = [](void* opaque, int64_t index) {
    FloatEnvironment environment;
    const auto& [scan, plan] = *(Job*)opaque;
    const int64_t first = index * plan.blocks_per_task, last = std::min(plan.blocks, first + plan.blocks_per_task);
    if (last - first > 1 && outgrows_caches(scan)) return scan_together(scan, plan, first, last);
    for (int64_t i = first; i < last; ++i) {
      const ChannelBlock block = plan.at(scan, i);
      const TimeSpan whole = {0, scan.time, states_of(scan.initial_state, scan, block),
                              (float*)states_of(scan.last_state, scan, block)};
      if (const int status = kernels()->scan_forward(scan, block, whole)) return status;
    }
    return (int)HCMEN_OK;
  };
  if (threads.most != 1 && job.plan.tasks > 1) {
    return threads.run(threads.pool, job.plan.tasks, task, &job, work_of(scan) < kBriefWork);
  }
  for (int64_t i = 0; i < job.plan.tasks; ++i) {
    if (const int status = task(&job, i)) return status;
  }
  return HCMEN_OK;
}

}  // namespace hcmen

extern "C" {

HCMEN_API int hcmen_selective_scan_forward(const hcmen_scan* scan, int threads) {
  if (!scan || threads < 1) return HCMEN_BAD_ARGUMENT;
  return hcmen::scan_forward(*scan, hcmen::own_threads(threads));
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
