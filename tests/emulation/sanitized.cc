// The kernels over heap blocks of exactly their arrays' sizes, for the sanitizers: tests/csrc/test_cuda_kernels.py builds it
// with AddressSanitizer and UBSan on fibers, and with ThreadSanitizer on threads, and compares what the two print, a
// hash of every result.
//
//   sanitized all | few     few: cases that hundreds of real threads get through in seconds
//
// Whether the numbers are right is the business of the tests that load the same sources from Python.
#include <math.h>

#include <string>

#include "cuda_emulation.h"
#include "cuda_ops.h"

namespace {

uint64_t seed = 1;
float uniform() {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return (float)(seed >> 40) / (float)(1 << 24);
}

int failures = 0;

// `shift` elements lie before the array, so that its address is no multiple of four elements.
template <class T>
struct Array {
  std::unique_ptr<T[]> data;
  int64_t count, shift;
  Array(int64_t n, float low, float high, int64_t shift = 0) : data(new T[n + shift]), count(n), shift(shift) {
    for (int64_t i = 0; i < n; ++i) get()[i] = (T)(low + (high - low) * uniform());
  }
  T* get() { return data.get() + shift; }
};

template <class T>
void report(const std::string& what, Array<T>& x) {
  uint64_t hash = 14695981039346656037u;
  for (int64_t i = 0; i < x.count; ++i) {
    if (!isfinite((float)x.get()[i])) {
      printf("FAILED %s: element %lld is %g\n", what.c_str(), (long long)i, (double)x.get()[i]);
      ++failures;
      return;
    }
    for (size_t b = 0; b < sizeof(T); ++b) {
      hash = (hash ^ reinterpret_cast<const unsigned char*>(x.get() + i)[b]) * 1099511628211u;
    }
  }
  printf("%s %016llx\n", what.c_str(), (unsigned long long)hash);
}

void expect_ok(const std::string& what, int status) {
  if (status == HCMEN_OK) return;
  printf("FAILED %s: status %d\n", what.c_str(), status);
  ++failures;
}

struct Sizes {
  int64_t batch, time, channel, state, group;
  int lanes, time_warps;
  int64_t chunk;
};

constexpr float kNan = __builtin_nanf("");

template <class T>
void scan(const Sizes& z, bool gated, bool reverse, int64_t shift) {
  const int64_t series = z.batch * z.time * z.channel, projection = z.batch * z.time * z.group * z.state;
  const int64_t states = z.batch * z.channel * z.state;
  Array<T> u(series, -1, 1, shift), delta(series, -5, 0, shift), gate(series, -2, 2, shift), y(series, kNan, kNan, shift);
  Array<T> B(projection, -1, 1, shift), C(projection, -1, 1, shift);
  Array<float> A(z.channel * z.state, -4, 0), D(z.channel, -1, 1), bias(z.channel, -1, 1);
  Array<float> initial(states, -1, 1), last(states, kNan, kNan);
  hcmen_scan s{};
  s.batch = z.batch, s.time = z.time, s.channel = z.channel, s.state = z.state, s.group = z.group;
  s.dtype = sizeof(T) == 2, s.delta_softplus = 1, s.reverse = reverse;
  s.u = u.get(), s.delta = delta.get(), s.A = A.get(), s.B = B.get(), s.C = C.get();
  s.D = D.get(), s.delta_bias = bias.get(), s.z = gated ? gate.get() : nullptr;
  s.initial_state = initial.get(), s.y = y.get(), s.last_state = last.get();
  hcmen_cuda_launch launch{};
  launch.steps_per_chunk = z.chunk, launch.lanes_per_channel = z.lanes, launch.time_warps = z.time_warps;
  int64_t bytes = 0;
  const std::string name = "scan " + std::to_string(z.batch) + "x" + std::to_string(z.time) + "x" +
                           std::to_string(z.channel) + " n" + std::to_string(z.state) + " g" +
                           std::to_string(z.group) + (sizeof(T) == 2 ? " half" : "") + (gated ? " gated" : "") +
                           (reverse ? " reverse" : "") + (shift ? " shifted" : "");
  expect_ok(name, hcmen_cuda_selective_scan_workspace(&s, &launch, 0, &bytes));
  Array<float> workspace(bytes / 4, kNan, kNan);
  launch.workspace = workspace.get(), launch.workspace_bytes = bytes;
  expect_ok(name, hcmen_cuda_selective_scan_forward(&s, &launch));
  report(name + ": y", y);
  report(name + ": last_state", last);

  if (sizeof(T) != 4) return;
  Array<float> dy(series, -1, 1, shift), dlast(states, -1, 1), du(series, kNan, kNan), ddelta(series, kNan, kNan);
  Array<float> dA(A.count, kNan, kNan), dB(projection, kNan, kNan), dC(projection, kNan, kNan), dD(z.channel, kNan, kNan);
  Array<float> dbias(z.channel, kNan, kNan), dz(series, kNan, kNan), dinitial(states, kNan, kNan);
  const hcmen_scan_grad g = {dy.get(), dlast.get(), du.get(),    ddelta.get(),                dA.get(),      dB.get(),
                             dC.get(), dD.get(),    dbias.get(), gated ? dz.get() : nullptr, dinitial.get()};
  expect_ok(name, hcmen_cuda_selective_scan_workspace(&s, &launch, 1, &bytes));
  Array<float> backward_workspace(bytes / 4, kNan, kNan);
  launch.workspace = backward_workspace.get(), launch.workspace_bytes = bytes;
  expect_ok(name, hcmen_cuda_selective_scan_backward(&s, &g, &launch));
  report(name + ": du", du);
  report(name + ": ddelta", ddelta);
  report(name + ": dA", dA);
  report(name + ": dB", dB);
  report(name + ": dC", dC);
  report(name + ": dD", dD);
  report(name + ": ddelta_bias", dbias);
  if (gated) report(name + ": dz", dz);
  report(name + ": dinitial_state", dinitial);
}

struct DualSizes {
  int64_t batch, time, head, rows, state, group;
  int lanes, warps;
  int64_t chunk;
};

template <class T>
void dual(const DualSizes& z, bool gated, bool reverse, bool wide, int64_t shift) {
  const int64_t steps = z.batch * z.time * z.head, series = steps * z.rows, states = z.batch * z.head * z.rows * z.state;
  const int64_t projection = z.batch * z.time * z.group * z.state, skips = wide ? z.head * z.rows : z.head;
  Array<T> x(series, -1, 1, shift), dt(steps, -5, 0, shift), gate(series, -2, 2, shift), y(series, kNan, kNan, shift);
  Array<T> B(projection, -1, 1, shift), C(projection, -1, 1, shift);
  Array<float> A(z.head, -4, 0), D(skips, -1, 1), bias(z.head, -1, 1);
  Array<float> initial(states, -1, 1), last(states, kNan, kNan);
  hcmen_dual s{};
  s.batch = z.batch, s.time = z.time, s.head = z.head, s.head_dim = z.rows, s.state = z.state, s.group = z.group;
  s.dtype = sizeof(T) == 2, s.delta_softplus = 1, s.reverse = reverse, s.wide_D = wide, s.dt_min = 0.01f, s.dt_max = 0.9f;
  s.x = x.get(), s.dt = dt.get(), s.A = A.get(), s.B = B.get(), s.C = C.get();
  s.D = D.get(), s.dt_bias = bias.get(), s.z = gated ? gate.get() : nullptr;
  s.initial_state = initial.get(), s.y = y.get(), s.last_state = last.get();
  hcmen_cuda_launch launch{};
  launch.steps_per_chunk = z.chunk, launch.lanes_per_channel = z.lanes, launch.channel_warps = z.warps;
  int64_t bytes = 0;
  const std::string name = "dual " + std::to_string(z.batch) + "x" + std::to_string(z.time) + "x" +
                           std::to_string(z.head) + "x" + std::to_string(z.rows) + " n" + std::to_string(z.state) +
                           " g" + std::to_string(z.group) + (sizeof(T) == 2 ? " half" : "") + (gated ? " gated" : "") +
                           (reverse ? " reverse" : "") + (wide ? " wide" : "") + (shift ? " shifted" : "");
  expect_ok(name, hcmen_cuda_state_space_dual_workspace(&s, &launch, 0, &bytes));
  Array<float> workspace(bytes / 4, kNan, kNan);
  launch.workspace = workspace.get(), launch.workspace_bytes = bytes;
  expect_ok(name, hcmen_cuda_state_space_dual_forward(&s, &launch));
  report(name + ": y", y);
  report(name + ": last_state", last);

  if (sizeof(T) != 4 || z.state > HCMEN_CUDA_BACKWARD_STATES) return;
  Array<float> dy(series, -1, 1, shift), dlast(states, -1, 1), dx(series, kNan, kNan), ddt(steps, kNan, kNan);
  Array<float> dA(z.head, kNan, kNan), dB(projection, kNan, kNan), dC(projection, kNan, kNan), dD(skips, kNan, kNan);
  Array<float> dbias(z.head, kNan, kNan), dz(series, kNan, kNan), dinitial(states, kNan, kNan);
  const hcmen_dual_grad g = {dy.get(), dlast.get(), dx.get(),    ddt.get(),                   dA.get(),      dB.get(),
                             dC.get(), dD.get(),    dbias.get(), gated ? dz.get() : nullptr, dinitial.get()};
  expect_ok(name, hcmen_cuda_state_space_dual_workspace(&s, &launch, 1, &bytes));
  Array<float> backward_workspace(bytes / 4, kNan, kNan);
  launch.workspace = backward_workspace.get(), launch.workspace_bytes = bytes;
  expect_ok(name, hcmen_cuda_state_space_dual_backward(&s, &g, &launch));
  report(name + ": dx", dx);
  report(name + ": ddt", ddt);
  report(name + ": dA", dA);
  report(name + ": dB", dB);
  report(name + ": dC", dC);
  report(name + ": dD", dD);
  report(name + ": ddt_bias", dbias);
  if (gated) report(name + ": dz", dz);
  report(name + ": dinitial_state", dinitial);
}

template <class T>
void conv(int64_t batch, int64_t time, int64_t channel, int64_t width, bool reverse) {
  const int64_t series = batch * time * channel;
  Array<T> x(series, -1, 1), y(series, kNan, kNan);
  Array<float> weight(channel * width, -1, 1), bias(channel, -1, 1);
  const bool stateful = width > 1;
  const int64_t states = batch * (width - 1) * channel;
  Array<float> initial(states, -1, 1), last(states, kNan, kNan), dlast(states, -1, 1), dinitial(states, kNan, kNan);
  hcmen_conv c{};
  c.batch = batch, c.time = time, c.channel = channel, c.width = width;
  c.dtype = sizeof(T) == 2, c.silu = 1, c.reverse = reverse;
  c.x = x.get(), c.weight = weight.get(), c.bias = bias.get(), c.y = y.get();
  c.initial_state = stateful ? initial.get() : nullptr, c.last_state = stateful ? last.get() : nullptr;
  hcmen_cuda_launch launch{};
  const std::string name = "conv " + std::to_string(batch) + "x" + std::to_string(time) + "x" +
                           std::to_string(channel) + " w" + std::to_string(width) + (sizeof(T) == 2 ? " half" : "") +
                           (reverse ? " reverse" : "");
  expect_ok(name, hcmen_cuda_causal_conv1d_forward(&c, &launch));
  report(name + ": y", y);
  report(name + ": last_state", last);
  if (sizeof(T) != 4) return;
  Array<float> dy(series, -1, 1), dx(series, kNan, kNan), dweight(weight.count, kNan, kNan), dbias(channel, kNan, kNan);
  const hcmen_conv_grad g = {dy.get(),      stateful ? dlast.get() : nullptr, dx.get(), dweight.get(),
                             dbias.get(), stateful ? dinitial.get() : nullptr};
  int64_t bytes = 0;
  expect_ok(name, hcmen_cuda_causal_conv1d_workspace(&c, 1, &bytes));
  Array<float> workspace(bytes / 4, kNan, kNan);
  launch.workspace = workspace.get(), launch.workspace_bytes = bytes;
  expect_ok(name, hcmen_cuda_causal_conv1d_backward(&c, &g, &launch));
  report(name + ": dx", dx);
  report(name + ": dweight", dweight);
  report(name + ": dbias", dbias);
  report(name + ": dinitial_state", dinitial);
}

}  // namespace

int main(int argc, char** argv) {
  const bool all = argc > 1 && std::string(argv[1]) == "all";
  // batch, time, channel, state, group; lanes, time warps, chunk (0: by the rule)
  const Sizes few[] = {
      {1, 20, 12, 4, 1, 0, 0, 0},  {1, 33, 8, 16, 1, 4, 4, 0},   {1, 40, 5, 16, 1, 1, 1, 16},
      {2, 17, 12, 12, 3, 4, 2, 9}, {1, 18, 40, 16, 1, 4, 1, -1},
  };
  const Sizes more[] = {
      {1, 1, 1, 1, 1, 0, 0, 0},      {3, 16, 130, 4, 1, 0, 0, 0},  {2, 50, 64, 16, 2, 0, 0, 0},
      {1, 129, 36, 8, 1, 0, 0, 32},  {1, 70, 7, 64, 7, 0, 0, 24},  {1, 30, 4, 100, 1, 16, 2, 16},
      {2, 9, 3, 256, 1, 0, 0, 0},    {1, 300, 16, 16, 1, 2, 8, 0}, {40, 3, 4, 5, 1, 0, 0, 0},
      {1, 100, 256, 16, 1, 0, 0, 0}, {1, 25, 33, 17, 1, 0, 0, 8},  {1, 64, 20, 12, 5, 8, 16, 33},
  };
  // First what both builds run, so that the short output is the beginning of the long one.
  bool flag = false;
  for (const Sizes& z : few) {
    flag = !flag;
    scan<float>(z, flag, !flag, 0);
  }
  conv<float>(1, 20, 9, 4, false);
  // batch, time, head, rows, state, group; lanes, warps, chunk
  const DualSizes few_duals[] = {{1, 9, 3, 6, 5, 1, 0, 0, 0}, {1, 17, 2, 34, 20, 2, 8, 2, 8}};
  const DualSizes more_duals[] = {{1, 1, 1, 1, 1, 1, 0, 0, 0},   {2, 20, 5, 7, 33, 1, 0, 4, 9},
                                  {1, 10, 2, 64, 16, 1, 2, 4, 0}, {1, 18, 40, 1, 3, 4, 1, 4, 0},
                                  {1, 9, 1, 4, 257, 1, 0, 0, 0},  {1, 12, 1, 130, 20, 1, 0, 1, 0},
                                  {1, 9, 1, 3, 200, 1, 0, 0, 8},  {1, 70, 2, 5, 9, 1, 0, 0, 0}};
  for (const DualSizes& z : few_duals) {
    flag = !flag;
    dual<float>(z, flag, !flag, flag, 0);
  }
  const auto run = [&](const Sizes& z) {
    flag = !flag;
    scan<float>(z, !flag, flag, 1);
    scan<_Float16>(z, flag, flag, flag ? 0 : 1);
  };
  if (all) {
    for (const Sizes& z : few) run(z);
    for (const Sizes& z : more) run(z);
    for (const DualSizes& z : more_duals) {
      flag = !flag;
      dual<float>(z, !flag, flag, flag, flag ? 0 : 1);
      dual<_Float16>(z, flag, flag, !flag, flag ? 1 : 0);
    }
    for (int64_t width : {1, 2, 3, 4, 5, 16}) {
      for (int64_t time : {1, 8, 70}) {
        conv<float>(2, time, 130, width, time % 2 != 0);
        conv<_Float16>(1, time, 5, width, time % 2 == 0);
      }
    }
  }
  printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
