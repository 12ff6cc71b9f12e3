// Calls one kernel a number of times, for a program that counts instructions: benchmarks/instructions.py.
//
//   calls scan CHANNELS STEPS STATES HALF TIMES     the selective scan, gated, with softplus, batch 1, one thread
//   calls conv CHANNELS STEPS WIDTH HALF TIMES      the causal convolution with silu
//   calls exp ROUNDS TIMES                          exponentials in registers; prints how many a call computes
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "causal_conv1d.h"
#include "selective_scan.h"

namespace {

uint32_t seed = 1;
float uniform() {
  seed = seed * 1664525u + 1013904223u;
  return (float)(seed >> 8) / (float)(1 << 24);
}

// `count` numbers around `middle`. As float16 they are those from 1/4 to 1/2, whatever the middle: what is counted is
// the same for all that are neither subnormal nor large.
struct Array {
  std::vector<float> single;
  std::vector<uint16_t> half;
  Array(int64_t count, bool halves, float middle) {
    for (int64_t i = 0; i < count; ++i) {
      if (halves) {
        half.push_back((uint16_t)(0x3400 + (int)(1024 * uniform()) + (middle < 0 ? 0x8000 : 0)));
      } else {
        single.push_back(middle + uniform() - 0.5f);
      }
    }
  }
  void* get() { return half.empty() ? (void*)single.data() : (void*)half.data(); }
};

}  // namespace

int main(int count, char** arguments) {
  const auto number = [&](int i) { return i < count ? atoll(arguments[i]) : 0; };
  const char* what = count > 1 ? arguments[1] : "";
  if (hcmen_ops_problem()) return fprintf(stderr, "%s\n", hcmen_ops_problem()), 3;
  if (!strcmp(what, "exp") && count == 4) {
    int64_t computed = 0;
    for (int64_t i = 0; i < number(3); ++i) computed = hcmen_exp_loop(number(2));
    return printf("%s %lld\n", hcmen_ops_isa(), (long long)computed), 0;
  }
  if (count != 7) return fprintf(stderr, "see the head of calls.cc\n"), 2;
  const int64_t channels = number(2), steps = number(3), third = number(4), series = channels * steps;
  const bool half = number(5), is_scan = !strcmp(what, "scan");
  Array u(series, half, 0), delta(series, half, -4), z(series, half, 0), y(series, half, 0);
  Array B(steps * third, half, 0), C(steps * third, half, 0), A(channels * third, false, -1), D(channels, false, 0);
  for (int64_t i = 0; i < channels * third; ++i) A.single[(size_t)i] = -(float)(1 + i % third);
  hcmen_scan scan = {};
  scan.batch = 1, scan.time = steps, scan.channel = channels, scan.state = third, scan.group = 1;
  scan.dtype = half ? HCMEN_FLOAT16 : HCMEN_FLOAT32, scan.delta_softplus = 1;
  scan.u = u.get(), scan.delta = delta.get(), scan.A = A.single.data(), scan.B = B.get(), scan.C = C.get();
  scan.D = D.single.data(), scan.delta_bias = D.single.data(), scan.z = z.get(), scan.y = y.get();
  hcmen_conv conv = {};
  conv.batch = 1, conv.time = steps, conv.channel = channels, conv.width = third;
  conv.dtype = scan.dtype, conv.silu = 1;
  conv.x = u.get(), conv.weight = A.single.data(), conv.bias = D.single.data(), conv.y = y.get();
  for (int64_t i = 0; i < number(6); ++i) {
    const int status = is_scan ? hcmen_selective_scan_forward(&scan, 1) : hcmen_causal_conv1d_forward(&conv, 1);
    if (status != HCMEN_OK) return fprintf(stderr, "status %d\n", status), 1;
  }
  return printf("%s\n", hcmen_ops_isa()), 0;
}
