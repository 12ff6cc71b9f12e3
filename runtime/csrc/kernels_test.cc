// Tests of the kernels through the C interface, meant to be built with AddressSanitizer and UBSan as well: every array
// is a heap block of exactly its size, so that a read past an end is seen.
//
//   hcmen_ops_test grid            every operator, forward and backward, at awkward sizes, against plain double loops; every
//                                  float16; the caller's floating-point mode; scans cut in time
//   hcmen_ops_test ulp [stride]    elementary functions at every stride-th float32 bit pattern
//   hcmen_ops_test exhaustive [threads]  the same at every pattern, for every instruction set that this machine has
//   hcmen_ops_test allocations     that a forward pass makes none; needs AddressSanitizer, which counts
//
// Prints what failed, and returns the number of failures (at most 100).
#include <fenv.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "causal_conv1d.h"
#include "kernel_table.h"
#include "kernels.h"
#include "kernels_test.h"
#include "selective_scan.h"

#if defined(__SANITIZE_ADDRESS__)
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void*, size_t),
                                                          void (*)(const volatile void*));
#endif

namespace {

using namespace hcmen::test;

// --- elementary functions -------------------------------------------------------------------------------------------

constexpr int kFunctions = 6;
constexpr float kUnchecked = 100;  // beyond it the last one may do anything
const char* const kNames[kFunctions] = {"exp", "softplus", "silu", "sigmoid", "exp2", "exp2 (fast)"};
// What an architecture without fused multiply-adds comes to at the worst of all float32, or AVX-512 for silu and sigmoid.
const double kBounds[kFunctions] = {1.51, 2.34, 3.95, 3.1, 1.25, 1.25};

// The functions from 0 on, by the double ones of the C library, which are off by less than 2^-28 of these units.
void exact(float in, double (&out)[kFunctions]) {
  const double x = in, minus = exp(-x);
  out[0] = exp(x);
  out[1] = x > 40 ? x : log1p(out[0]);
  out[2] = x / (1 + minus);
  out[3] = 1 / (1 + minus);
  out[4] = out[5] = exp2(x);
}

// Units in the last place of float32 at `value`, subnormals included.
double ulp_at(double value) {
  uint64_t bits;
  memcpy(&bits, &value, 8);
  const int exponent = std::max((int)(bits >> 52 & 0x7ff) - 1022, -125);
  bits = (uint64_t)(exponent - 24 + 1023) << 52;
  memcpy(&value, &bits, 8);
  return value;
}

struct Worst {
  double error = 0;
  float at = 0;
  bool bad_nan = false;
};

// Elementary functions at the `count` values of x.
void measure(int function, const std::vector<float>& x, const std::vector<float>& y, const double (*want_of)[kFunctions],
             Worst& worst) {
  for (size_t i = 0; i < x.size(); ++i) {
    if (function == 5 && !(fabsf(x[i]) < kUnchecked)) continue;
    const double want = want_of[i][function];
    if (isnan(x[i]) || isnan(want)) {
      worst.bad_nan = worst.bad_nan || !isnan(y[i]);
      continue;
    }
    // Beyond the largest float32 by half a unit is infinity.
    const float nearest = (float)want;
    if (isinf(nearest) && isinf(y[i]) && (nearest > 0) == (y[i] > 0)) continue;
    // A subnormal silu has lost digits with its subnormal factor, and is flushed to zero in a scan anyway.
    const double unit = function == 2 && fabs(want) < 0x1p-120 ? 0x1p-143 : ulp_at(want);
    const double error = fabs((double)y[i] - want) / unit;
    if (!(error <= worst.error)) worst.error = error, worst.at = x[i];
  }
}

void test_functions(const std::vector<const hcmen::KernelTable*>& tables, int64_t stride, int threads) {
  using Worsts = std::vector<Worst>;  // [table][function]
  std::vector<Worsts> found(threads, Worsts(tables.size() * kFunctions));
  const auto work = [&](int thread) {
    constexpr int64_t kBatch = 4096;
    std::vector<float> x, y, within;
    std::vector<double> wants(kBatch * kFunctions);
    auto* const want = (double (*)[kFunctions])wants.data();
    const auto flush = [&] {
      for (size_t i = 0; i < x.size(); ++i) exact(x[i], want[i]);
      y.resize(x.size());
      within = x;
      for (float& value : within) value = fabsf(value) < kUnchecked ? value : 0;
      for (size_t t = 0; t < tables.size(); ++t) {
        for (int function = 0; function < kFunctions; ++function) {
          tables[t]->evaluate(function, (function == 5 ? within : x).data(), y.data(), (int64_t)x.size());
          measure(function, x, y, want, found[thread][t * kFunctions + function]);
        }
      }
      x.clear();
    };
    for (int64_t batch = thread; batch * kBatch * stride < (int64_t)1 << 32; batch += threads) {
      for (int64_t i = 0; i < kBatch; ++i) {
        const int64_t bits = (batch * kBatch + i) * stride;
        if (bits >= (int64_t)1 << 32) break;
        const uint32_t pattern = (uint32_t)bits;
        float value;
        memcpy(&value, &pattern, 4);
        x.push_back(value);
      }
      flush();
    }
    const float infinity = std::numeric_limits<float>::infinity();
    x = {0.0f, -0.0f, 20.0f, 88.7f, 88.8f, -87.3f, -103.9f, -104.1f, infinity, -infinity};
    flush();
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& other : others) other.join();
  for (size_t t = 0; t < tables.size(); ++t) {
    for (int function = 0; function < kFunctions; ++function) {
      Worst all;
      for (const Worsts& one : found) {
        const Worst& own = one[t * kFunctions + function];
        if (!(own.error <= all.error)) all.error = own.error, all.at = own.at;
        all.bad_nan = all.bad_nan || own.bad_nan;
      }
      const std::string name = std::string(tables[t]->name) + " " + kNames[function];
      printf("%s: at most %.3f units in the last place, at %.9g\n", name.c_str(), all.error, all.at);
      if (all.bad_nan) fail(name + " of NaN", 0, NAN);
      if (!(all.error <= kBounds[function])) fail(name, all.error, kBounds[function]);
    }
  }
}

// --- the scan -------------------------------------------------------------------------------------------------------

struct Case {
  int64_t batch, time, channel, state, group;
  bool half, gated, stateful, reverse, with_softplus;
};

void test_scan(const Case& c) {
  char name[200];
  snprintf(name, sizeof name, "scan b%d t%d c%d n%d g%d%s%s%s%s%s", (int)c.batch, (int)c.time, (int)c.channel,
           (int)c.state, (int)c.group, c.half ? " half" : "", c.gated ? " gated" : "", c.stateful ? " stateful" : "",
           c.reverse ? " reverse" : "", c.with_softplus ? " softplus" : "");
  const int64_t series = c.batch * c.time * c.channel, projection = c.batch * c.time * c.group * c.state;
  const int64_t states = c.batch * c.channel * c.state, columns = c.channel * c.state;
  Input u(series, c.half, 0), delta(series, c.half, c.with_softplus ? -2 : 0), B(projection, c.half, 0);
  Input C(projection, c.half, 0), z(c.gated ? series : 0, c.half, 0);
  if (!c.with_softplus) {
    // Steps without softplus are positive in use; negative ones would grow without end.
    for (int64_t i = 0; i < series; ++i) {
      delta.value[(size_t)i] = fabs(delta.value[(size_t)i]);
      if (c.half) delta.half[i] &= 0x7fff;
      if (!c.half) delta.single[i] = fabsf(delta.single[i]);
    }
  }
  Array<float> A(columns), D(c.channel), bias(c.channel), initial(c.stateful ? states : 0);
  for (int64_t i = 0; i < columns; ++i) A[i] = -(float)(1 + i % c.state % 16) * (float)(1 + 0.01 * uniform());
  for (int64_t i = 0; i < c.channel; ++i) D[i] = (float)normal(), bias[i] = (float)(0.1 * uniform());
  for (int64_t i = 0; i < initial.count; ++i) initial[i] = (float)normal();
  Array<float> y(c.half ? 0 : series), last(c.stateful ? states : 0);
  Array<uint16_t> y_half(c.half ? series : 0);

  hcmen_scan scan = {};
  scan.batch = c.batch, scan.time = c.time, scan.channel = c.channel, scan.state = c.state, scan.group = c.group;
  scan.dtype = c.half ? HCMEN_FLOAT16 : HCMEN_FLOAT32;
  scan.delta_softplus = c.with_softplus, scan.reverse = c.reverse;
  scan.u = u.get(), scan.delta = delta.get(), scan.A = A.data.get(), scan.B = B.get(), scan.C = C.get();
  scan.D = D.data.get(), scan.delta_bias = bias.data.get(), scan.z = c.gated ? z.get() : nullptr;
  scan.initial_state = c.stateful ? initial.data.get() : nullptr;
  scan.y = c.half ? (void*)y_half.data.get() : (void*)y.data.get();
  scan.last_state = c.stateful ? last.data.get() : nullptr;
  if (hcmen_selective_scan_forward(&scan, 3) != HCMEN_OK) return fail(std::string(name) + " forward", 1, 0);

  // The definition, and its gradient by hand, in double. h[k] is the state before the step of rank k.
  std::vector<double> want_y(series), want_last(states), dy(series), dlast(states);
  std::vector<double> du(series), ddelta(series), dz(c.gated ? series : 0), dB(projection), dC(projection);
  std::vector<double> dA(columns), dD(c.channel), dbias(c.channel), dinitial(states);
  Array<float> dy_in(series), dlast_in(states);
  for (int64_t i = 0; i < series; ++i) dy[(size_t)i] = dy_in[i] = (float)normal();
  for (int64_t i = 0; i < states; ++i) dlast[(size_t)i] = dlast_in[i] = (float)normal();
  std::vector<double> h((size_t)((c.time + 1) * c.state));
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t i = 0; i < c.channel; ++i) {
      const int64_t group = i / (c.channel / c.group);
      std::vector<double> steps(c.time), ungated(c.time);
      for (int64_t n = 0; n < c.state; ++n) h[n] = c.stateful ? initial[(b * c.channel + i) * c.state + n] : 0;
      for (int64_t k = 0; k < c.time; ++k) {
        const int64_t t = c.reverse ? c.time - 1 - k : k;
        const int64_t at = (b * c.time + t) * c.channel + i, row = ((b * c.time + t) * c.group + group) * c.state;
        double d = delta.value[at] + bias[i];
        if (c.with_softplus) d = softplus(d);
        steps[k] = d;
        double sum = D[i] * u.value[at];
        for (int64_t n = 0; n < c.state; ++n) {
          double& next = h[(k + 1) * c.state + n];
          next = exp(d * A[i * c.state + n]) * h[k * c.state + n] + d * B.value[row + n] * u.value[at];
          sum += C.value[row + n] * next;
        }
        ungated[k] = sum;
        want_y[at] = c.gated ? sum * z.value[at] * sigmoid(z.value[at]) : sum;
      }
      std::vector<double> g(c.state);
      for (int64_t n = 0; n < c.state; ++n) {
        want_last[(b * c.channel + i) * c.state + n] = h[c.time * c.state + n];
        g[n] = dlast[(b * c.channel + i) * c.state + n];
      }
      for (int64_t k = c.time - 1; k >= 0; --k) {
        const int64_t t = c.reverse ? c.time - 1 - k : k;
        const int64_t at = (b * c.time + t) * c.channel + i, row = ((b * c.time + t) * c.group + group) * c.state;
        double s = dy[at];
        if (c.gated) {
          const double zt = z.value[at], gate = sigmoid(zt);
          dz[at] = s * ungated[k] * gate * (1 + zt * (1 - gate));
          s *= zt * gate;
        }
        double dd = 0;
        du[at] = D[i] * s;
        dD[i] += s * u.value[at];
        for (int64_t n = 0; n < c.state; ++n) {
          const double a = A[i * c.state + n], decay = exp(steps[k] * a), before = h[k * c.state + n];
          const double own = C.value[row + n] * s + g[n];
          dC[row + n] += s * h[(k + 1) * c.state + n];
          dB[row + n] += own * steps[k] * u.value[at];
          du[at] += own * steps[k] * B.value[row + n];
          dd += own * (a * decay * before + B.value[row + n] * u.value[at]);
          dA[i * c.state + n] += own * steps[k] * decay * before;
          g[n] = own * decay;
        }
        ddelta[at] = dd * (c.with_softplus ? sigmoid(delta.value[at] + bias[i]) : 1);
        dbias[i] += ddelta[at];
      }
      for (int64_t n = 0; n < c.state; ++n) dinitial[(b * c.channel + i) * c.state + n] = g[n];
    }
  }
  if (c.half) {
    for (int64_t i = 0; i < series; ++i) {
      const double got = half_value(y_half[i]), error = fabs(got - want_y[i]);
      if (!(error <= 1e-4 + 1e-3 * fabs(want_y[i])) && fabs(want_y[i]) < 65504) {
        fail(std::string(name) + " y", got, want_y[i]);
        break;
      }
    }
    return;
  }
  compare(std::string(name) + " y", y, want_y, 1e-6);
  if (c.stateful) compare(std::string(name) + " last_state", last, want_last, 1e-6);

  scan.y = nullptr, scan.last_state = nullptr;
  Array<float> got_u(series), got_delta(series), got_A(columns), got_B(projection), got_C(projection), got_D(c.channel);
  Array<float> got_bias(c.channel), got_z(c.gated ? series : 0), got_initial(states);
  hcmen_scan_grad grad = {};
  grad.dy = dy_in.data.get(), grad.dlast_state = dlast_in.data.get();
  grad.du = got_u.data.get(), grad.ddelta = got_delta.data.get(), grad.dA = got_A.data.get();
  grad.dB = got_B.data.get(), grad.dC = got_C.data.get(), grad.dD = got_D.data.get();
  grad.ddelta_bias = got_bias.data.get(), grad.dz = c.gated ? got_z.data.get() : nullptr;
  grad.dinitial_state = got_initial.data.get();
  for (int threads : {1, 3}) {
    if (hcmen_selective_scan_backward(&scan, &grad, threads) != HCMEN_OK) {
      return fail(std::string(name) + " backward", 1, 0);
    }
    const std::string prefix = std::string(name) + " threads " + std::to_string(threads);
    compare(prefix + " du", got_u, du, 4e-6);
    compare(prefix + " ddelta", got_delta, ddelta, 4e-6);
    compare(prefix + " dA", got_A, dA, 4e-6);
    compare(prefix + " dB", got_B, dB, 4e-6);
    compare(prefix + " dC", got_C, dC, 4e-6);
    compare(prefix + " dD", got_D, dD, 4e-6);
    compare(prefix + " ddelta_bias", got_bias, dbias, 4e-6);
    compare(prefix + " dz", got_z, dz, 4e-6);
    compare(prefix + " dinitial_state", got_initial, dinitial, 4e-6);
  }
}

// --- the convolution ------------------------------------------------------------------------------------------------

void test_conv(int64_t batch, int64_t time, int64_t channel, int64_t width, bool half, bool silu, bool reverse,
               bool stateful) {
  char name[120];
  snprintf(name, sizeof name, "conv b%d t%d c%d w%d%s%s%s%s", (int)batch, (int)time, (int)channel, (int)width,
           half ? " half" : "", silu ? " silu" : "", reverse ? " reverse" : "", stateful ? " stateful" : "");
  const int64_t series = batch * time * channel, past = width - 1, states = stateful ? batch * past * channel : 0;
  Input x(series, half, 0);
  Array<float> weight(channel * width), bias(channel), y(half ? 0 : series), dy_in(series);
  Array<uint16_t> y_half(half ? series : 0);
  for (int64_t i = 0; i < weight.count; ++i) weight[i] = (float)normal();
  for (int64_t i = 0; i < channel; ++i) bias[i] = (float)normal();
  for (int64_t i = 0; i < series; ++i) dy_in[i] = (float)normal();
  Array<float> initial(states), last(states), dlast_in(states);
  for (int64_t i = 0; i < states; ++i) initial[i] = (float)normal(), dlast_in[i] = (float)normal();
  hcmen_conv conv = {};
  conv.batch = batch, conv.time = time, conv.channel = channel, conv.width = width;
  conv.dtype = half ? HCMEN_FLOAT16 : HCMEN_FLOAT32, conv.silu = silu, conv.reverse = reverse;
  conv.x = x.get(), conv.weight = weight.data.get(), conv.bias = bias.data.get();
  conv.y = half ? (void*)y_half.data.get() : (void*)y.data.get();
  if (stateful) conv.initial_state = initial.data.get(), conv.last_state = last.data.get();
  if (hcmen_causal_conv1d_forward(&conv, 3) != HCMEN_OK) return fail(std::string(name) + " forward", 1, 0);

  // Of a row of the state and then of the series, in scanning order: value, and where its gradient goes.
  std::vector<double> want(series), want_last(states), dx(series), dweight(channel * width), dbias(channel);
  std::vector<double> dinitial(states);
  const auto place = [&](int64_t b, int64_t row, int64_t i) {
    const int64_t t = reverse ? time - 1 - (row - past) : row - past;
    return row < past ? (b * past + row) * channel + i : (b * time + t) * channel + i;
  };
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < time; ++t) {
      for (int64_t i = 0; i < channel; ++i) {
        const int64_t at = place(b, t + past, i);
        const auto value = [&](int64_t k) {
          const int64_t from = place(b, t + k, i);
          return t + k >= past ? x.value[from] : stateful ? (double)initial[from] : 0.0;
        };
        double p = bias[i];
        for (int64_t k = 0; k < width; ++k) p += weight[i * width + k] * value(k);
        want[at] = silu ? p * sigmoid(p) : p;
        const double dp = dy_in[at] * (silu ? sigmoid(p) * (1 + p * (1 - sigmoid(p))) : 1);
        dbias[i] += dp;
        for (int64_t k = 0; k < width; ++k) {
          dweight[i * width + k] += dp * value(k);
          if (t + k < past && !stateful) continue;
          (t + k < past ? dinitial : dx)[place(b, t + k, i)] += dp * weight[i * width + k];
        }
      }
    }
    for (int64_t j = 0; j < (stateful ? past : 0); ++j) {
      for (int64_t i = 0; i < channel; ++i) {
        const int64_t row = time + j, from = place(b, row, i), to = (b * past + j) * channel + i;
        want_last[to] = row < past ? (double)initial[from] : x.value[from];
        (row < past ? dinitial : dx)[from] += dlast_in[to];
      }
    }
  }
  for (int64_t i = 0; i < states; ++i) {
    if (last[i] != (float)want_last[i]) return fail(std::string(name) + " last_state", last[i], want_last[i]);
  }
  if (half) {
    for (int64_t i = 0; i < series; ++i) {
      const double got = half_value(y_half[i]);
      if (!(fabs(got - want[i]) <= 1e-4 + 1e-3 * fabs(want[i]))) return fail(std::string(name) + " y", got, want[i]);
    }
    return;
  }
  compare(std::string(name) + " y", y, want, 2e-6);
  conv.y = nullptr, conv.last_state = nullptr;
  Array<float> got_x(series), got_weight(channel * width), got_bias(channel), got_initial(states);
  hcmen_conv_grad grad = {};
  grad.dy = dy_in.data.get(), grad.dx = got_x.data.get(), grad.dweight = got_weight.data.get();
  grad.dbias = got_bias.data.get();
  if (stateful) grad.dlast_state = dlast_in.data.get(), grad.dinitial_state = got_initial.data.get();
  for (int threads : {1, 3}) {
    if (hcmen_causal_conv1d_backward(&conv, &grad, threads) != HCMEN_OK) {
      return fail(std::string(name) + " backward", 1, 0);
    }
    compare(std::string(name) + " dx", got_x, dx, 2e-6);
    compare(std::string(name) + " dweight", got_weight, dweight, 2e-6);
    compare(std::string(name) + " dbias", got_bias, dbias, 2e-6);
    compare(std::string(name) + " dinitial_state", got_initial, dinitial, 2e-6);
  }
}

// --- scans cut in time ----------------------------------------------------------------------------------------------

// Long scans of few channels, which several threads share by segments of time: the same bits as on one thread. Where
// `rate` is small, states never forget how a segment was begun, and all of it is made again.
void test_cut(int64_t batch, int64_t time, int64_t channel, int64_t group, double rate, bool reverse, bool half) {
  const int64_t state = 3, series = batch * time * channel, projection = batch * time * group * state;
  const int64_t states = batch * channel * state;
  Input u(series, half, 0), delta(series, half, -2), B(projection, half, 0), C(projection, half, 0), z(series, half, 0);
  Array<float> A(channel * state), D(channel), bias(channel), initial(states);
  for (int64_t i = 0; i < A.count; ++i) A[i] = -(float)(rate * (1 + i % state));
  for (int64_t i = 0; i < channel; ++i) D[i] = (float)normal();
  for (int64_t i = 0; i < states; ++i) initial[i] = (float)normal();
  Array<float> one(series), many(series), last_one(states), last_many(states);
  hcmen_scan scan = {};
  scan.batch = batch, scan.time = time, scan.channel = channel, scan.state = state, scan.group = group;
  scan.dtype = half ? HCMEN_FLOAT16 : HCMEN_FLOAT32, scan.delta_softplus = 1, scan.reverse = reverse;
  scan.u = u.get(), scan.delta = delta.get(), scan.A = A.data.get(), scan.B = B.get(), scan.C = C.get();
  scan.D = D.data.get(), scan.delta_bias = bias.data.get(), scan.z = z.get(), scan.initial_state = initial.data.get();
  scan.y = one.data.get(), scan.last_state = last_one.data.get();
  const size_t bytes = (size_t)series * (half ? 2 : 4);
  if (hcmen_selective_scan_forward(&scan, 1) != HCMEN_OK) return fail("cut scan on one thread", 1, 0);
  scan.y = many.data.get(), scan.last_state = last_many.data.get();
  for (int threads : {2, 3, 8}) {
    memset(many.data.get(), 0xff, (size_t)series * 4);
    memset(last_many.data.get(), 0xff, (size_t)states * 4);
    if (hcmen_selective_scan_forward(&scan, threads) != HCMEN_OK) return fail("cut scan", 1, 0);
    if (memcmp(one.data.get(), many.data.get(), bytes) != 0 ||
        memcmp(last_one.data.get(), last_many.data.get(), (size_t)states * 4) != 0) {
      fail("bits of a scan cut in time, " + std::to_string(threads) + " threads, rate " + std::to_string(rate), 1, 0);
    }
  }
}

void test_cuts() {
  for (double rate : {1.0, 1e-3, 0.0}) {
    test_cut(1, 8191, 2, 1, rate, false, false);  // one step short of being cut
    test_cut(1, 8192, 5, 1, rate, true, false);
    test_cut(1, 20011, 3, 1, rate, false, false);
    test_cut(2, 17000, 4, 2, rate, true, true);
  }
  // Too much for the caches: on one thread the blocks go through time together, on 8 each by itself.
  test_cut(1, 4300, 63, 1, 1, true, false);
  test_cut(3, 2200, 64, 2, 1, false, true);
}

// --- allocations ----------------------------------------------------------------------------------------------------

std::atomic<int64_t> allocations{0};

#if defined(__SANITIZE_ADDRESS__)
void count_allocation(const volatile void*, size_t) { ++allocations; }
void count_nothing(const volatile void*) {}

void test_allocations() {
  if (!__sanitizer_install_malloc_and_free_hooks(count_allocation, count_nothing)) return fail("malloc hook", 0, 1);
  const int64_t before = allocations;
  void* volatile one = malloc(1);
  free(one);
  if (allocations == before) fail("allocations seen by the hook", 0, 1);
  const int64_t time = 130, channel = 200, most = 256;
  Array<float> series(time * channel), projection(time * most), A(channel * most), row(channel), y(time * channel);
  Array<float> last(3 * channel);
  for (int threads : {1, 3}) {
    for (int64_t state : {1, 12, 16, 256}) {
      for (int32_t dtype : {HCMEN_FLOAT32, HCMEN_FLOAT16}) {
        hcmen_scan scan = {};
        scan.batch = 1, scan.time = time, scan.channel = channel, scan.state = state, scan.group = 1;
        scan.dtype = dtype, scan.delta_softplus = 1;
        scan.u = scan.delta = scan.z = series.data.get(), scan.B = scan.C = projection.data.get();
        scan.A = A.data.get(), scan.D = scan.delta_bias = row.data.get(), scan.y = y.data.get();
        hcmen_conv conv = {};
        conv.batch = 1, conv.time = time, conv.channel = channel, conv.width = 4, conv.dtype = dtype;
        conv.x = series.data.get(), conv.weight = A.data.get(), conv.bias = row.data.get(), conv.y = y.data.get();
        if (state > 1) conv.initial_state = projection.data.get(), conv.last_state = last.data.get();
        int64_t start = 0;
        for (int call = 0; call < 20; ++call) {
          if (call == 2) start = allocations;  // workers may start in the first ones
          if (hcmen_selective_scan_forward(&scan, threads) != HCMEN_OK) return fail("scan forward", 1, 0);
          if (hcmen_causal_conv1d_forward(&conv, threads) != HCMEN_OK) return fail("conv forward", 1, 0);
        }
        const int64_t made = allocations - start;
        if (made) fail("allocations of 18 forward passes with " + std::to_string(state) + " states", (double)made, 0);
      }
    }
  }
}
#endif

// --- float16, and the floating-point mode ---------------------------------------------------------------------------

// To nearest, ties to even, over the whole range.
uint16_t rounded_half(double value) {
  const uint16_t sign = signbit(value) ? 0x8000 : 0;
  const double size = fabs(value);
  if (isnan(value)) return 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  int exponent = -13;
  if (size >= 0x1p-14) frexp(size, &exponent);
  const int unit = exponent - 11;  // the last place of a half of this size; that of subnormals is -24
  const int64_t count = (int64_t)nearbyint(ldexp(size, -unit));
  return (uint16_t)(sign | (((int64_t)(unit + 24) << 10) + count));
}

// A convolution of width 1 as a product: every float16 comes in, and the factors send what goes out to ties, overflow
// and subnormals. The products are exact in float32.
void test_halves() {
  constexpr int64_t kPatterns = 65536;
  Array<uint16_t> x(kPatterns), y(kPatterns);
  for (int64_t i = 0; i < kPatterns; ++i) x[i] = (uint16_t)i;
  for (float factor : {1.0f, 0x1.002p0f, 0x1.004p0f, 0x1.ffcp-1f, 0x1.554p-2f, 0x1p-1f, 0x1.8p-9f, 0x1p-13f, 3.0f}) {
    for (int64_t channel : {1, 4, 7}) {  // lanes one by one, whole vectors, both
      const int64_t time = kPatterns / channel;
      Array<float> weight(channel), bias(channel);
      for (int64_t i = 0; i < channel; ++i) weight[i] = factor;
      hcmen_conv conv = {};
      conv.batch = 1, conv.time = time, conv.channel = channel, conv.width = 1, conv.dtype = HCMEN_FLOAT16;
      conv.x = x.data.get(), conv.weight = weight.data.get(), conv.bias = bias.data.get(), conv.y = y.data.get();
      if (hcmen_causal_conv1d_forward(&conv, 1) != HCMEN_OK) return fail("float16 forward", 1, 0);
      for (int64_t i = 0; i < time * channel; ++i) {
        const int exponent = x[i] >> 10 & 31, mantissa = x[i] & 1023;
        const bool is_nan = exponent == 31 && mantissa;
        const double in = exponent == 31 ? (x[i] & 0x8000 ? -INFINITY : INFINITY) : half_value(x[i]);
        if (is_nan) {
          if ((y[i] & 0x7c00) != 0x7c00 || !(y[i] & 0x3ff)) return fail("float16 NaN", y[i], 0x7e00);
        } else if (y[i] != rounded_half(in * factor + 0.0)) {
          return fail("float16 " + std::to_string(in) + " times " + std::to_string(factor), y[i],
                      rounded_half(in * factor + 0.0));
        }
      }
    }
  }
}

// A kernel computes as it always does, whatever the caller has set, and leaves that as it was.
void test_environment() {
  Array<float> x(1), weight(1), bias(1), y(1);
  const auto product = [&](float a, float b) {
    x[0] = a, weight[0] = b;
    hcmen_conv conv = {};
    conv.batch = conv.time = conv.channel = conv.width = 1, conv.dtype = HCMEN_FLOAT32;
    conv.x = x.data.get(), conv.weight = weight.data.get(), conv.bias = bias.data.get(), conv.y = y.data.get();
    if (hcmen_causal_conv1d_forward(&conv, 1) != HCMEN_OK) fail("environment forward", 1, 0);
    return y[0];
  };
  const float nearest = product(1.0f / 3, 3.0000002f);
  for (int mode : {FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO, FE_TONEAREST}) {
    fesetround(mode);
    const float got = product(1.0f / 3, 3.0000002f);
    const int after = fegetround();
    fesetround(FE_TONEAREST);
    if (got != nearest) fail("a product while the caller rounds by mode " + std::to_string(mode), got, nearest);
    if (after != mode) fail("the caller's rounding mode", after, mode);
  }
#if defined(__SSE2__) || defined(__aarch64__)
  if (product(0x1p-100f, 0x1p-40f) != 0) fail("a subnormal product", y[0], 0);
  if (product(0x1p-140f, 0x1p40f) != 0) fail("a subnormal factor", y[0], 0);
#endif
  volatile float tiny = 0x1p-140f;
  if (tiny * 0.5f == 0) fail("the caller's subnormals", 0, 0x1p-141);
}

// --- everything -----------------------------------------------------------------------------------------------------

void test_grid() {
  int variety = 0;
  for (const Case& size : std::vector<Case>{
           {1, 1, 1, 1, 1, 0, 0, 0, 0, 0},
           {3, 2, 15, 4, 3, 0, 0, 0, 0, 0},
           {1, 7, 16, 12, 2, 0, 0, 0, 0, 0},
           {3, 33, 17, 16, 1, 0, 0, 0, 0, 0},
           {1, 70, 130, 17, 1, 0, 0, 0, 0, 0},
           {2, 16, 20, 64, 5, 0, 0, 0, 0, 0},
           {1, 500, 40, 5, 1, 0, 0, 0, 0, 0},
           {9, 65, 70, 3, 1, 0, 0, 0, 0, 0},
           {1, 31, 512, 8, 2, 0, 0, 0, 0, 0},
       }) {
    for (int flags = 0; flags < 32; ++flags) {
      // Each size meets half of the combinations, each combination half of the sizes.
      if ((flags + variety++) % 2) continue;
      Case c = size;
      c.half = flags & 1, c.gated = flags & 2, c.stateful = flags & 4, c.reverse = flags & 8;
      c.with_softplus = flags & 16;
      test_scan(c);
    }
    ++variety;
  }
  for (int64_t width : {1, 2, 3, 4, 7}) {
    for (int flags = 0; flags < (width > 1 ? 16 : 8); ++flags) {
      for (const auto& [batch, time, channel] :
           std::vector<std::tuple<int64_t, int64_t, int64_t>>{{1, 1, 1}, {3, 2, 15}, {1, 7, 16}, {2, 50, 17}, {1, 40, 131}}) {
        test_conv(batch, time, channel, width, flags & 1, flags & 2, flags & 4, flags & 8);
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "";
  if (hcmen_ops_problem()) {
    printf("%s\n", hcmen_ops_problem());
    return 100;
  }
  printf("instruction set: %s\n", hcmen_ops_isa());
  if (mode == "grid") {
    test_grid();
    test_duals();
    test_cuts();
    test_halves();
    test_environment();
  } else if (mode == "ulp") {
    const long long stride = count > 2 ? atoll(arguments[2]) : 997;
    if (stride < 1) return 100;
    test_functions({hcmen::kernels()}, stride, 1);
  } else if (mode == "exhaustive") {
    const int threads = count > 2 ? atoi(arguments[2]) : 1;
    if (threads < 1) return 100;
    std::vector<const hcmen::KernelTable*> tables;
    while (const hcmen::KernelTable* table = hcmen::kernels_at((int)tables.size())) tables.push_back(table);
    test_functions(tables, 1, threads);
#if defined(__SANITIZE_ADDRESS__)
  } else if (mode == "allocations") {
    test_allocations();
#endif
  } else {
    printf("usage: hcmen_ops_test grid | ulp [stride] | exhaustive [threads] | allocations\n");
    return 100;
  }
  printf("%d failures\n", failures);
  return failures < 100 ? failures : 100;
}
