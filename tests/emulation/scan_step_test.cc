// scan_step.h as plain loops on the host, for tests/mamba/test_scan_step.py: no kernel, the arithmetic alone. Built as a shared
// library; sizes and pointers as in selective_scan.h, float32 only.
#include "scan_step.h"

#include <vector>

#include "causal_conv1d.h"
#include "selective_scan.h"

namespace step = hcmen::step;

namespace {

const float* floats(const void* p) { return static_cast<const float*>(p); }

struct Channel {
  const hcmen_scan& s;
  int64_t batch, channel;

  int64_t at(int64_t index) const {
    return (batch * s.time + step::place(index, s.time, s.reverse)) * s.channel + channel;
  }
  int64_t projection(int64_t index) const {
    const int64_t group = channel / (s.channel / s.group);
    return ((batch * s.time + step::place(index, s.time, s.reverse)) * s.group + group) * s.state;
  }
  int64_t states() const { return (batch * s.channel + channel) * s.state; }
  float d(int64_t index) const {
    return step::step_size(floats(s.delta)[at(index)], s.delta_bias[channel], s.delta_softplus);
  }
  float u(int64_t index) const { return floats(s.u)[at(index)]; }
  float rate(int64_t n) const { return s.A[channel * s.state + n] * step::kLog2e; }
  float initial(int64_t n) const { return s.initial_state ? s.initial_state[states() + n] : 0.0f; }

  void outputs(int64_t first, int64_t end, std::vector<float>& h) const {
    for (int64_t i = first; i < end; ++i) {
      const float d_i = d(i), u_i = u(i);
      float sum = 0;
      for (int64_t n = 0; n < s.state; ++n) {
        h[n] = step::advance(h[n], d_i, rate(n), d_i * u_i, floats(s.B)[projection(i) + n]);
        sum += floats(s.C)[projection(i) + n] * h[n];
      }
      const float z = s.z ? floats(s.z)[at(i)] : 0.0f;
      static_cast<float*>(s.y)[at(i)] = step::output(sum, u_i, s.D[channel], s.z != nullptr, z);
    }
  }
};

template <class Work>
void each_channel(const hcmen_scan& s, Work work) {
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t c = 0; c < s.channel; ++c) work(Channel{s, b, c});
  }
}

}  // namespace

extern "C" {

// chunk <= 0: step after step. Else in chunks of so many steps: all of them from zero, then their starts one after the
// other, then all outputs.
HCMEN_API void step_forward(const hcmen_scan* scan, int64_t chunk) {
  const hcmen_scan& s = *scan;
  each_channel(s, [&](const Channel& c) {
    std::vector<float> h(s.state);
    for (int64_t n = 0; n < s.state; ++n) h[n] = c.initial(n);
    const int64_t size = chunk <= 0 ? s.time : chunk, chunks = (s.time + size - 1) / size;
    std::vector<step::Chunk> parts(chunks * s.state);
    for (int64_t j = 0; j < chunks; ++j) {
      for (int64_t n = 0; n < s.state; ++n) {
        step::Chunk part{0, 0};
        for (int64_t i = j * size; i < s.time && i < (j + 1) * size; ++i) {
          const float d = c.d(i);
          part.end = step::advance(part.end, d, c.rate(n), d * c.u(i), floats(s.B)[c.projection(i) + n]);
          part.steps += d;
        }
        parts[j * s.state + n] = part;
      }
    }
    std::vector<float> start(chunks * s.state);
    for (int64_t n = 0; n < s.state; ++n) {
      float state = c.initial(n);
      for (int64_t j = 0; j < chunks; ++j) {
        start[j * s.state + n] = state;
        state = step::after(parts[j * s.state + n], c.rate(n), state);
      }
    }
    for (int64_t j = 0; j < chunks; ++j) {
      for (int64_t n = 0; n < s.state; ++n) h[n] = start[j * s.state + n];
      c.outputs(j * size, j == chunks - 1 ? s.time : (j + 1) * size, h);
    }
    if (s.last_state) {
      for (int64_t n = 0; n < s.state; ++n) s.last_state[c.states() + n] = h[n];
    }
  });
}

HCMEN_API void step_backward(const hcmen_scan* scan, const hcmen_scan_grad* grad) {
  const hcmen_scan& s = *scan;
  const hcmen_scan_grad& g = *grad;
  const int64_t projections = s.batch * s.time * s.group * s.state;
  for (int64_t i = 0; i < projections; ++i) g.dB[i] = g.dC[i] = 0;
  for (int64_t i = 0; i < s.channel * s.state; ++i) g.dA[i] = 0;
  for (int64_t i = 0; i < s.channel; ++i) g.dD[i] = g.ddelta_bias[i] = 0;
  each_channel(s, [&](const Channel& c) {
    std::vector<float> h((s.time + 1) * s.state);
    for (int64_t n = 0; n < s.state; ++n) h[n] = c.initial(n);
    for (int64_t i = 0; i < s.time; ++i) {
      const float d = c.d(i);
      for (int64_t n = 0; n < s.state; ++n) {
        h[(i + 1) * s.state + n] =
            step::advance(h[i * s.state + n], d, c.rate(n), d * c.u(i), floats(s.B)[c.projection(i) + n]);
      }
    }
    std::vector<float> state_gradient(s.state);
    for (int64_t n = 0; n < s.state; ++n) state_gradient[n] = g.dlast_state ? g.dlast_state[c.states() + n] : 0.0f;
    for (int64_t i = s.time - 1; i >= 0; --i) {
      const int64_t at = c.at(i), row = c.projection(i);
      const step::StepSize d = step::step_size_and_slope(floats(s.delta)[at], s.delta_bias[c.channel], s.delta_softplus);
      const step::Gate gate = s.z ? step::gate(floats(s.z)[at]) : step::Gate{1, 0};
      const float u = c.u(i), out = g.dy[at] * gate.value;
      float y = s.D[c.channel] * u, through = 0, decayed = 0;
      for (int64_t n = 0; n < s.state; ++n) {
        const float C = floats(s.C)[row + n], after = h[(i + 1) * s.state + n];
        y = fmaf(C, after, y);
        g.dC[row + n] += out * after;
        step::retreat(h[i * s.state + n], d.size, d.size * u, out, c.rate(n), floats(s.B)[row + n], C,
                      state_gradient[n], g.dA[c.channel * s.state + n], g.dB[row + n], through, decayed);
      }
      g.du[at] = s.D[c.channel] * out + d.size * through;
      g.ddelta[at] = d.slope * (step::kLn2 * decayed + u * through);
      if (g.dz) g.dz[at] = g.dy[at] * gate.slope * y;
      g.dD[c.channel] += out * u;
      g.ddelta_bias[c.channel] += g.ddelta[at];
    }
    if (g.dinitial_state) {
      for (int64_t n = 0; n < s.state; ++n) g.dinitial_state[c.states() + n] = state_gradient[n];
    }
  });
}

// y[i] = f(x[i]): 0 softplus, 1 sigmoid, 2 silu, 3 the derivative of silu, 4 log1p on [0, 1], 5 exp(-|x|).
HCMEN_API void step_evaluate(int function, const float* x, float* y, int64_t count) {
  static float (*const functions[])(float) = {step::softplus,   step::sigmoid,       step::silu,
                                              step::silu_slope, step::log1p_of_unit, step::exp_of_minus_size};
  for (int64_t i = 0; i < count; ++i) y[i] = functions[function](x[i]);
}

}  // extern "C"
