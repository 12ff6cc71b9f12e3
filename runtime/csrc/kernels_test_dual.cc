// The state space dual against plain double loops; see kernels_test.cc.
#include <string.h>

#include "kernels_test.h"
#include "state_space_dual.h"

namespace hcmen::test {
namespace {

struct Case {
  int64_t batch, time, head, head_dim, group, state;
  bool half, gated, stateful, reverse, with_softplus, wide;
};

// A scan cut into two calls: the second one goes on from the states of the first, and must give the same bits.
void test_cut(const std::string& name, hcmen_dual dual, Array<float>& y, Array<float>& last) {
  const int64_t first = dual.time / 2, rest = dual.time - first;
  if (dual.batch > 1 || dual.reverse || first == 0) return;
  const int64_t row = dual.head * dual.head_dim, projection = dual.group * dual.state;
  Array<float> cut(y.count), between(last.count), end(last.count);
  dual.time = first, dual.y = cut.data.get(), dual.last_state = between.data.get();
  if (hcmen_state_space_dual_forward(&dual, 1) != HCMEN_OK) return fail(name + " cut", 1, 0);
  const auto on = [&](const void*& array, int64_t size) { array = array ? (const float*)array + first * size : array; };
  on(dual.x, row), on(dual.z, row), on(dual.dt, dual.head), on(dual.B, projection), on(dual.C, projection);
  dual.time = rest, dual.y = cut.data.get() + first * row;
  dual.initial_state = between.data.get(), dual.last_state = end.data.get();
  if (hcmen_state_space_dual_forward(&dual, 1) != HCMEN_OK) return fail(name + " cut", 1, 0);
  if (memcmp(cut.data.get(), y.data.get(), (size_t)y.count * sizeof(float))) fail(name + " cut in two: y", 1, 0);
  if (memcmp(end.data.get(), last.data.get(), (size_t)last.count * sizeof(float))) fail(name + " cut in two", 1, 0);
}

void test_dual(const Case& c) {
  char text[200];
  snprintf(text, sizeof text, "dual b%d t%d h%d p%d g%d n%d%s%s%s%s%s%s", (int)c.batch, (int)c.time, (int)c.head,
           (int)c.head_dim, (int)c.group, (int)c.state, c.half ? " half" : "", c.gated ? " gated" : "",
           c.stateful ? " stateful" : "", c.reverse ? " reverse" : "", c.with_softplus ? " softplus" : "",
           c.wide ? " wide" : "");
  const std::string name = text;
  const int64_t series = c.batch * c.time * c.head * c.head_dim, sizes = c.batch * c.time * c.head;
  const int64_t projection = c.batch * c.time * c.group * c.state, states = c.batch * c.head * c.head_dim * c.state;
  const int64_t skips = c.wide ? c.head * c.head_dim : c.head;
  Input x(series, c.half, 0), dt(sizes, c.half, c.with_softplus ? -2 : 0), B(projection, c.half, 0);
  Input C(projection, c.half, 0), z(c.gated ? series : 0, c.half, 0);
  Array<float> A(c.head), D(skips), bias(c.head), initial(c.stateful ? states : 0);
  for (int64_t i = 0; i < c.head; ++i) A[i] = -(float)(0.5 + 8 * uniform()), bias[i] = (float)(0.1 * uniform());
  for (int64_t i = 0; i < skips; ++i) D[i] = (float)normal();
  for (int64_t i = 0; i < initial.count; ++i) initial[i] = (float)normal();
  // Without a softplus half of the step sizes are negative, and cut.
  const float least = 0, most = c.with_softplus ? INFINITY : 0.75f;
  Array<float> y(c.half ? 0 : series), last(c.half ? 0 : states);
  Array<uint16_t> y_half(c.half ? series : 0);

  hcmen_dual dual = {};
  dual.batch = c.batch, dual.time = c.time, dual.head = c.head, dual.head_dim = c.head_dim;
  dual.group = c.group, dual.state = c.state, dual.dtype = c.half ? HCMEN_FLOAT16 : HCMEN_FLOAT32;
  dual.delta_softplus = c.with_softplus, dual.reverse = c.reverse, dual.wide_D = c.wide;
  dual.dt_min = least, dual.dt_max = most;
  dual.x = x.get(), dual.dt = dt.get(), dual.A = A.data.get(), dual.B = B.get(), dual.C = C.get();
  dual.D = D.data.get(), dual.dt_bias = bias.data.get(), dual.z = c.gated ? z.get() : nullptr;
  dual.initial_state = c.stateful ? initial.data.get() : nullptr;
  dual.y = c.half ? (void*)y_half.data.get() : (void*)y.data.get();
  dual.last_state = c.half ? nullptr : last.data.get();
  if (hcmen_state_space_dual_forward(&dual, 3) != HCMEN_OK) return fail(name + " forward", 1, 0);

  // The definition, and its gradient by hand, in double. h[k] is the state before the step of rank k.
  std::vector<double> want_y(series), want_last(states), dy(series), dlast(states);
  std::vector<double> dx(series), ddt(sizes), dz(c.gated ? series : 0), dB(projection), dC(projection);
  std::vector<double> dA(c.head), dD(skips), dbias(c.head), dinitial(states);
  Array<float> dy_in(series), dlast_in(states);
  for (int64_t i = 0; i < series; ++i) dy[i] = dy_in[i] = (float)normal();
  for (int64_t i = 0; i < states; ++i) dlast[i] = dlast_in[i] = (float)normal();
  std::vector<double> h((size_t)((c.time + 1) * c.state));
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t i = 0; i < c.head * c.head_dim; ++i) {
      const int64_t head = i / c.head_dim, group = head / (c.head / c.group), skip = c.wide ? i : head;
      const int64_t own_states = (b * c.head * c.head_dim + i) * c.state;
      std::vector<double> steps(c.time), slopes(c.time), ungated(c.time);
      for (int64_t n = 0; n < c.state; ++n) h[n] = c.stateful ? initial[own_states + n] : 0;
      const auto time_of = [&](int64_t k) { return b * c.time + (c.reverse ? c.time - 1 - k : k); };
      for (int64_t k = 0; k < c.time; ++k) {
        const int64_t at = time_of(k) * c.head * c.head_dim + i, row = (time_of(k) * c.group + group) * c.state;
        const double raw = dt.value[time_of(k) * c.head + head] + bias[head];
        const double whole = c.with_softplus ? softplus(raw) : raw;
        steps[k] = fmin(fmax(whole, least), most);
        slopes[k] = steps[k] != whole ? 0 : c.with_softplus ? sigmoid(raw) : 1;
        double sum = D[skip] * x.value[at];
        for (int64_t n = 0; n < c.state; ++n) {
          double& next = h[(k + 1) * c.state + n];
          next = exp(steps[k] * A[head]) * h[k * c.state + n] + steps[k] * B.value[row + n] * x.value[at];
          sum += C.value[row + n] * next;
        }
        ungated[k] = sum;
        want_y[at] = c.gated ? sum * z.value[at] * sigmoid(z.value[at]) : sum;
      }
      std::vector<double> g(c.state);
      for (int64_t n = 0; n < c.state; ++n) {
        want_last[own_states + n] = h[c.time * c.state + n];
        g[n] = dlast[own_states + n];
      }
      for (int64_t k = c.time - 1; k >= 0; --k) {
        const int64_t at = time_of(k) * c.head * c.head_dim + i, row = (time_of(k) * c.group + group) * c.state;
        double s = dy[at], through_step = 0;
        if (c.gated) {
          const double zt = z.value[at], gate = sigmoid(zt);
          dz[at] = s * ungated[k] * gate * (1 + zt * (1 - gate));
          s *= zt * gate;
        }
        dx[at] = D[skip] * s;
        dD[skip] += s * x.value[at];
        const double decay = exp(steps[k] * A[head]);
        for (int64_t n = 0; n < c.state; ++n) {
          const double before = h[k * c.state + n], own = C.value[row + n] * s + g[n];
          dC[row + n] += s * h[(k + 1) * c.state + n];
          dB[row + n] += own * steps[k] * x.value[at];
          dx[at] += own * steps[k] * B.value[row + n];
          through_step += own * (A[head] * decay * before + B.value[row + n] * x.value[at]);
          dA[head] += own * steps[k] * decay * before;
          g[n] = own * decay;
        }
        ddt[time_of(k) * c.head + head] += through_step * slopes[k];
        dbias[head] += through_step * slopes[k];
      }
      for (int64_t n = 0; n < c.state; ++n) dinitial[own_states + n] = g[n];
    }
  }
  if (c.half) {
    for (int64_t i = 0; i < series; ++i) {
      const double got = half_value(y_half[i]), error = fabs(got - want_y[i]);
      if (!(error <= 1e-4 + 1e-3 * fabs(want_y[i]))) return fail(name + " y", got, want_y[i]);
    }
    return;
  }
  compare(name + " y", y, want_y, 1e-6);
  compare(name + " last_state", last, want_last, 1e-6);
  test_cut(name, dual, y, last);

  dual.y = nullptr, dual.last_state = nullptr;
  Array<float> got_x(series), got_dt(sizes), got_A(c.head), got_B(projection), got_C(projection), got_D(skips);
  Array<float> got_bias(c.head), got_z(c.gated ? series : 0), got_initial(states);
  hcmen_dual_grad grad = {};
  grad.dy = dy_in.data.get(), grad.dlast_state = dlast_in.data.get();
  grad.dx = got_x.data.get(), grad.ddt = got_dt.data.get(), grad.dA = got_A.data.get();
  grad.dB = got_B.data.get(), grad.dC = got_C.data.get(), grad.dD = got_D.data.get();
  grad.ddt_bias = got_bias.data.get(), grad.dz = c.gated ? got_z.data.get() : nullptr;
  grad.dinitial_state = got_initial.data.get();
  for (int threads : {1, 3}) {
    if (hcmen_state_space_dual_backward(&dual, &grad, threads) != HCMEN_OK) return fail(name + " backward", 1, 0);
    const std::string prefix = name + " threads " + std::to_string(threads);
    compare(prefix + " dx", got_x, dx, 4e-6);
    compare(prefix + " ddt", got_dt, ddt, 4e-6);
    compare(prefix + " dA", got_A, dA, 4e-6);
    compare(prefix + " dB", got_B, dB, 4e-6);
    compare(prefix + " dC", got_C, dC, 4e-6);
    compare(prefix + " dD", got_D, dD, 4e-6);
    compare(prefix + " ddt_bias", got_bias, dbias, 4e-6);
    compare(prefix + " dz", got_z, dz, 4e-6);
    compare(prefix + " dinitial_state", got_initial, dinitial, 4e-6);
  }
}

// What no kernel may run on.
void test_refusals() {
  float one = 1;
  hcmen_dual good = {};
  good.batch = good.time = good.head = good.head_dim = good.group = good.state = 1;
  good.dt_max = 1;
  good.x = good.dt = good.B = good.C = &one, good.A = good.D = good.dt_bias = &one, good.y = &one;
  const auto refused = [](const char* what, const hcmen_dual& dual) {
    if (hcmen_state_space_dual_forward(&dual, 1) != HCMEN_BAD_ARGUMENT) fail(std::string("not refused: ") + what, 0, 1);
  };
  if (hcmen_state_space_dual_forward(&good, 1) != HCMEN_OK) fail("a good call", 1, 0);
  hcmen_dual bad = good;
  bad.dt_min = 2, refused("limits", bad);
  bad = good, bad.dt_max = NAN, refused("a limit that is no number", bad);
  bad = good, bad.head = 0, refused("no heads", bad);
  bad = good, bad.group = 2, refused("groups", bad);
  bad = good, bad.dtype = 2, refused("a type", bad);
  bad = good, bad.D = nullptr, refused("no D", bad);
  bad = good, bad.y = nullptr, refused("no y", bad);
  bad = good, bad.time = INT64_MAX / 4, refused("sizes beyond all memory", bad);
}

}  // namespace

void test_duals() {
  int variety = 0;
  for (const Case& size : std::vector<Case>{
           {1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0},
           {3, 2, 6, 5, 3, 7, 0, 0, 0, 0, 0, 0},
           {1, 17, 3, 16, 1, 16, 0, 0, 0, 0, 0, 0},
           {2, 33, 4, 3, 2, 100, 0, 0, 0, 0, 0, 0},
           {1, 50, 2, 64, 1, 64, 0, 0, 0, 0, 0, 0},
           {1, 40, 24, 1, 8, 33, 0, 0, 0, 0, 0, 0},
           {1, 16, 2, 17, 2, 300, 0, 0, 0, 0, 0, 0},
           {2, 1, 24, 20, 3, 128, 0, 0, 0, 0, 0, 0},
       }) {
    for (int flags = 0; flags < 64; ++flags) {
      // Each size meets a fifth of the combinations, each combination a fifth of the sizes.
      if ((flags + variety++) % 5) continue;
      Case c = size;
      c.half = flags & 1, c.gated = flags & 2, c.stateful = flags & 4, c.reverse = flags & 8;
      c.with_softplus = flags & 16, c.wide = flags & 32;
      test_dual(c);
    }
  }
  test_refusals();
}

}  // namespace hcmen::test
