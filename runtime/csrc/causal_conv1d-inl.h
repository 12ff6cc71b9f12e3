// The causal convolution, vectorised over channels. See vector-inl.h for the rules of these files.
#ifndef HCMEN_CAUSAL_CONV1D_INL_H_
#define HCMEN_CAUSAL_CONV1D_INL_H_

#include "kernel_table.h"
#include "vector-inl.h"

namespace hcmen {
namespace HCMEN_ISA_NAMESPACE {

constexpr int kConvBlockVectors = (int)(kBlockChannels / kLanes);

HCMEN_INLINE int block_lanes(const ChannelBlock& block, int64_t v) {
  const int64_t left = block.count - v * kLanes;
  return left < kLanes ? (int)left : kLanes;
}

// [channel, width] -> vectors [tap][v], lanes beyond the last channel zero.
HCMEN_INLINE void load_taps(const float* from, int64_t channels, int64_t width, F* to) {
  const int64_t vectors = (channels + kLanes - 1) / kLanes;
  for (int64_t v = 0; v < vectors; ++v, from += kLanes * width) {
    const int lanes = channels - v * kLanes < kLanes ? (int)(channels - v * kLanes) : kLanes;
    if (width == 4 && lanes == kLanes) {
      const F a = load(from), b = load(from + kLanes), c = load(from + 2 * kLanes), d = load(from + 3 * kLanes);
      const F even_ab = even_lanes(a, b), even_cd = even_lanes(c, d), odd_ab = odd_lanes(a, b), odd_cd = odd_lanes(c, d);
      to[v] = even_lanes(even_ab, even_cd);
      to[vectors + v] = even_lanes(odd_ab, odd_cd);
      to[2 * vectors + v] = odd_lanes(even_ab, even_cd);
      to[3 * vectors + v] = odd_lanes(odd_ab, odd_cd);
      continue;
    }
    for (int64_t k = 0; k < width; ++k) {
      float x[kLanes] = {};
      for (int i = 0; i < lanes; ++i) x[i] = from[i * width + k];
      to[k * vectors + v] = load(x);
    }
  }
}

// Rows of one batch element in scanning order: step i at first + i * stride, whichever way time runs.
template <class T>
struct Series {
  T* first;
  int64_t stride;
};

template <class T, class Pointer>
HCMEN_INLINE Series<T> series_of(Pointer* array, const hcmen_conv& c, int64_t batch, int64_t channel) {
  const int64_t start = c.reverse ? c.time - 1 : 0;
  return Series<T>{(T*)array + (batch * c.time + start) * c.channel + channel, c.reverse ? -c.channel : c.channel};
}

// The inputs, and before them the initial state: row -1 is its last, at past - channel.
template <class T>
struct Inputs {
  Series<const T> series;
  const float* past;  // null: zeros
  int64_t channel;
};

// `lanes` channels from `offset` on of step i, which may be negative at the edge of time.
template <bool edge, class T>
HCMEN_INLINE F input_at(const Inputs<T>& x, int64_t i, int64_t offset, int lanes) {
  if (!edge || i >= 0) return load(x.series.first + i * x.series.stride + offset, lanes);
  return x.past ? load(x.past + i * x.channel + offset, lanes) : F{};
}

template <class T>
HCMEN_INLINE Inputs<T> inputs_of(const hcmen_conv& c, int64_t batch, int64_t channel) {
  const int64_t end = (batch + 1) * (c.width - 1) * c.channel;  // of the state of this batch element
  const float* const past = c.initial_state ? c.initial_state + end + channel : nullptr;
  return Inputs<T>{series_of<const T>(c.x, c, batch, channel), past, c.channel};
}

// Calls work(k) for every tap, unrolled where time is spent.
template <bool edge, class Work>
HCMEN_INLINE void each_tap(int64_t width, Work work) {
  if (edge) {
#pragma GCC unroll 1
    for (int64_t k = 0; k < width; ++k) work(k);
  } else {
#pragma GCC unroll 4
    for (int64_t k = 0; k < width; ++k) work(k);
  }
}

// bias + the taps of step t, `lanes` channels from `offset` on. Zeros before the series are multiplied like any input,
// here and below, so that a series has the same bits whole and in pieces.
template <int fixed_width, bool edge, class T>
HCMEN_INLINE F convolve(const Inputs<T>& x, int64_t t, int64_t offset, int lanes, int64_t width, const F* taps,
                        int64_t vectors, F bias) {
  if (fixed_width) width = fixed_width;
  F sum = bias;
  const auto add = [&](int64_t k) __attribute__((always_inline)) {
    sum = fma(taps[k * vectors], input_at<edge>(x, t - (width - 1) + k, offset, lanes), sum);
  };
  each_tap<edge>(width, add);
  return sum;
}

// What a block does about the last state, which is the business of the last one of a batch element.
template <class T>
HCMEN_INLINE void write_last_state(const hcmen_conv& c, const TimeBlock& block) {
  if (!c.last_state || block.time + block.count < c.time) return;
  const auto x = inputs_of<T>(c, block.batch, 0);
  const int64_t past = c.width - 1;
  float* row = c.last_state + block.batch * past * c.channel;
  for (int64_t i = c.time - past; i < c.time; ++i, row += c.channel) {
    for (int64_t offset = 0; offset < c.channel; offset += kLanes) {
      const int lanes = c.channel - offset < kLanes ? (int)(c.channel - offset) : kLanes;
      store(row + offset, input_at<true>(x, i, offset, lanes), lanes);
    }
  }
}

// Steps that one vector of channels takes in a row: their inputs are loaded once, for all taps, and rows enough for them
// stay in the first-level cache.
constexpr int kConvSteps = 8;

// Vectors of channels whose taps are laid out at a time, on the stack.
constexpr int kConvVectors = 256 / kLanes;

// kConvSteps steps of a whole vector of channels. `recent`: the inputs of the `width` - 1 steps before. `far`: neither
// array is in a cache, nor will the output be, and whole vectors lie on multiples of their size; the inputs of the next
// steps are asked for.
template <int width, bool with_silu, bool far, class T>
HCMEN_INLINE void convolve_steps(Series<const T> x, Series<T> y, const F (&taps)[width], F bias, F (&recent)[width]) {
#pragma GCC unroll 8
  for (int i = 0; i < kConvSteps; ++i) {
    recent[width - 1] = load(x.first + i * x.stride, kLanes);
    if (far) prefetch(x.first + (i + kConvSteps) * x.stride);
    F sum = bias;
#pragma GCC unroll 4
    for (int k = 0; k < width; ++k) sum = fma(taps[k], recent[k], sum);
    const F out = with_silu ? silu(sum) : sum;
    if (far) {
      store_past_caches((float*)(y.first + i * y.stride), out);
    } else {
      store(y.first + i * y.stride, out, kLanes);
    }
#pragma GCC unroll 4
    for (int k = 0; k < width - 1; ++k) recent[k] = recent[k + 1];
  }
}

// The last steps of a block, the last channels of a row, or the first steps after a state: `x` and `y` from the first step of the series on, `taps`
// [tap][v], and the state before the series as in `Inputs`. Apart, since the steps above keep their inputs in registers
// only where nobody else can see them; and with each argument for itself, which costs a short call less than a structure.
template <int width, bool with_silu, class T>
HCMEN_APART void convolve_rest(Series<const T> x, Series<T> y, int64_t t, int64_t steps, int lanes, const F* taps,
                               int64_t vectors, F bias, const float* past, int64_t channel) {
  F recent[width];
#pragma GCC unroll 4
  for (int k = 0; k < width - 1; ++k) {
    const int64_t from = t - (width - 1) + k;
    recent[k] = from >= 0 ? load(x.first + from * x.stride, lanes) : past ? load(past + from * channel, lanes) : F{};
  }
  for (const int64_t end = t + steps; t < end; ++t) {
    recent[width - 1] = load(x.first + t * x.stride, lanes);
    F sum = bias;
#pragma GCC unroll 4
    for (int k = 0; k < width; ++k) sum = fma(taps[k * vectors], recent[k], sum);
    store(y.first + t * y.stride, with_silu ? silu(sum) : sum, lanes);
#pragma GCC unroll 4
    for (int k = 0; k < width - 1; ++k) recent[k] = recent[k + 1];
  }
}

// Channels from `first` on, for which there are `vectors` vectors of taps, [tap][v].
template <int width, bool with_silu, bool far, class T>
HCMEN_INLINE void conv_forward_part(const hcmen_conv& c, const TimeBlock& block, int64_t first, int64_t vectors,
                                    const F* all_taps, const F* bias) {
  const auto x = inputs_of<T>(c, block.batch, first);
  const auto y = series_of<T>(c.y, c, block.batch, first);
  const int64_t end = block.time + block.count;
  for (int64_t t = block.time; t < end; t += kConvSteps) {
    const int64_t steps = end - t < kConvSteps ? end - t : kConvSteps;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t offset = v * kLanes, left = c.channel - first - offset;
      if (left < kLanes || steps < kConvSteps || (x.past && t < width - 1)) {
        const int lanes = left < kLanes ? (int)left : kLanes;
        const Series<const T> in = {x.series.first + offset, x.series.stride};
        const Series<T> out = {y.first + offset, y.stride};
        const float* const past = x.past ? x.past + offset : nullptr;
        convolve_rest<width, with_silu>(in, out, t, steps, lanes, all_taps + v, vectors, bias[v], past, x.channel);
        continue;
      }
      F taps[width], recent[width];
#pragma GCC unroll 4
      for (int k = 0; k < width; ++k) taps[k] = all_taps[k * vectors + v];
#pragma GCC unroll 4
      for (int k = 0; k < width - 1; ++k) {
        const int64_t from = t - (width - 1) + k;
        recent[k] = from < 0 ? F{} : load(x.series.first + from * x.series.stride + offset, kLanes);
      }
      const Series<const T> in = {x.series.first + t * x.series.stride + offset, x.series.stride};
      const Series<T> out = {y.first + t * y.stride + offset, y.stride};
      convolve_steps<width, with_silu, far>(in, out, taps, bias[v], recent);
    }
  }
}

template <class T, int width, bool far>
static int conv_forward_typed(const hcmen_conv& c, const TimeBlock& block) {
  F taps[width * kConvVectors], bias[kConvVectors];
  for (int64_t first = 0; first < c.channel; first += kConvVectors * kLanes) {
    const int64_t left = c.channel - first, channels = left < kConvVectors * kLanes ? left : kConvVectors * kLanes;
    const int64_t vectors = (channels + kLanes - 1) / kLanes;
    load_taps(c.weight + first * width, channels, width, taps);
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t rest = channels - v * kLanes;
      bias[v] = load(c.bias + first + v * kLanes, rest < kLanes ? (int)rest : kLanes);
    }
    if (c.silu) {
      conv_forward_part<width, true, far, T>(c, block, first, vectors, taps, bias);
    } else {
      conv_forward_part<width, false, far, T>(c, block, first, vectors, taps, bias);
    }
  }
  if (far) past_caches_done();
  return HCMEN_OK;
}

// Whether outputs of this type can be written past the caches; and those of this block are to be, and can.
template <class T>
constexpr bool kGoesFar = kStoresPastCaches && sizeof(T) == sizeof(float);

template <class T>
HCMEN_INLINE bool goes_far(const hcmen_conv& c, const TimeBlock& block) {
  return kGoesFar<T> && block.far && (uintptr_t)c.y % sizeof(F) == 0 && c.channel % kLanes == 0;
}

// Steps from `t` on to `end` at any width, of which `taps` are [tap][v].
template <bool edge, class T>
HCMEN_INLINE void convolve_any(const hcmen_conv& c, int64_t batch, int64_t t, int64_t end, const F* taps) {
  const int64_t vectors = (c.channel + kLanes - 1) / kLanes;
  const auto x = inputs_of<T>(c, batch, 0);
  const auto y = series_of<T>(c.y, c, batch, 0);
  for (; t < end; ++t) {
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t offset = v * kLanes;
      const int lanes = c.channel - offset < kLanes ? (int)(c.channel - offset) : kLanes;
      const F bias = load(c.bias + offset, lanes);
      const F sum = convolve<0, edge>(x, t, offset, lanes, c.width, taps + v, vectors, bias);
      store(y.first + t * y.stride + offset, c.silu ? silu(sum) : sum, lanes);
    }
  }
}

// The widths that nobody uses.
template <class T>
static int conv_forward_any(const hcmen_conv& c, const TimeBlock& block) {
  const int64_t vectors = (c.channel + kLanes - 1) / kLanes;
  Scratch scratch(vectors * c.width, 0);
  if (!scratch.works()) return HCMEN_NO_MEMORY;
  F* taps = scratch.vectors(vectors * c.width);
  load_taps(c.weight, c.channel, c.width, taps);
  const int64_t end = block.time + block.count, past = c.width - 1;
  const int64_t edge = block.time > past ? block.time : end < past ? end : past;
  convolve_any<true, T>(c, block.batch, block.time, edge, taps);
  convolve_any<false, T>(c, block.batch, edge, end, taps);
  return HCMEN_OK;
}

template <class T>
static int conv_forward_width(const hcmen_conv& c, const TimeBlock& block) {
  const bool far = goes_far<T>(c, block);
  switch (c.width) {
    case 2: return far ? conv_forward_typed<T, 2, kGoesFar<T>>(c, block) : conv_forward_typed<T, 2, false>(c, block);
    case 3: return far ? conv_forward_typed<T, 3, kGoesFar<T>>(c, block) : conv_forward_typed<T, 3, false>(c, block);
    case 4: return far ? conv_forward_typed<T, 4, kGoesFar<T>>(c, block) : conv_forward_typed<T, 4, false>(c, block);
    default: return conv_forward_any<T>(c, block);
  }
}

static int conv_forward(const hcmen_conv& c, const TimeBlock& block) {
  if (c.dtype == HCMEN_FLOAT16) {
    write_last_state<Half>(c, block);
    return conv_forward_width<Half>(c, block);
  }
  write_last_state<float>(c, block);
  return conv_forward_width<float>(c, block);
}

// Whether a step of the backward pass is within the filter's reach of either edge of time.
struct AtEdge {
  static constexpr bool kEdge = true;
};
struct Inside {
  static constexpr bool kEdge = false;
};

// Gradients for one block of channels over all of time. With p the convolution before the activation,
//   dp[t] = dy[t] silu'(p[t]),  dx[t] = sum over k of weight[k] dp[t + (width - 1) - k],
//   dweight[k] = sum over t of dp[t] x[t - (width - 1) + k],  dbias = sum over t of dp[t].
// The initial state is x[t] of negative t, and so are their gradients. The last state is x of the last steps.
template <int fixed_width>
static int conv_backward_typed(const hcmen_conv& c, const hcmen_conv_grad& grad, float* dweight, float* dbias,
                               const ChannelBlock& block) {
  const int64_t width = fixed_width ? fixed_width : c.width;
  const int64_t vectors = (block.count + kLanes - 1) / kLanes;
  Scratch scratch(3 * vectors * width, 0);
  if (!scratch.works()) return HCMEN_NO_MEMORY;
  F* taps = scratch.vectors(vectors * width);
  F* dtaps = scratch.vectors(vectors * width);
  F* recent = scratch.vectors(vectors * width);  // dp of the last `width` steps, a ring
  load_taps(c.weight + block.channel * width, block.count, width, taps);
  for (int64_t i = 0; i < vectors * width; ++i) dtaps[i] = recent[i] = F{};
  F bias[kConvBlockVectors], sum[kConvBlockVectors];
  for (int64_t v = 0; v < vectors; ++v) {
    bias[v] = load(c.bias + block.channel + v * kLanes, block_lanes(block, v));
    sum[v] = F{};
  }
  const auto x = inputs_of<float>(c, block.batch, block.channel);
  const int64_t past = width - 1, states = block.batch * past * c.channel + block.channel;
  const auto dy = series_of<const float>(grad.dy, c, block.batch, block.channel);
  const auto dx = series_of<float>(grad.dx, c, block.batch, block.channel);

  // Step t adds dp[t]; it completes dx[t - past]. At either edge of time a state takes the place of inputs.
  int64_t slot = 0;
  const auto step = [&](int64_t t, auto part) __attribute__((always_inline)) {
    constexpr bool edge = decltype(part)::kEdge;
    F* const now = recent + slot * vectors;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t offset = v * kLanes;
      const int lanes = block_lanes(block, v);
      F dp = {};
      if (!edge || t < c.time) {
        dp = load(dy.first + t * dy.stride + offset, lanes);
        if (c.silu) {
          const F p = convolve<fixed_width, edge>(x, t, offset, lanes, width, taps + v, vectors, bias[v]);
          const F gate = sigmoid(p);
          dp *= gate * fma(p, 1.0f - gate, splat(1.0f));
        }
        sum[v] += dp;
        const auto add = [&](int64_t k) __attribute__((always_inline)) {
          const F xk = input_at<edge>(x, t - past + k, offset, lanes);
          dtaps[k * vectors + v] = fma(dp, xk, dtaps[k * vectors + v]);
        };
        each_tap<edge>(width, add);
      }
      now[v] = dp;
    }
    float* to = dx.first + (t - past) * dx.stride;
    if (edge && t < past) to = grad.dinitial_state ? grad.dinitial_state + states + t * c.channel : nullptr;
    const float* last = nullptr;
    if (edge && t >= c.time && grad.dlast_state) last = grad.dlast_state + states + (t - c.time) * c.channel;
    for (int64_t v = 0; v < vectors && (!edge || to); ++v) {
      const int64_t offset = v * kLanes;
      F total = {};
      int64_t ring = slot;
      const auto add = [&](int64_t k) __attribute__((always_inline)) {
        total = fma(taps[k * vectors + v], recent[ring * vectors + v], total);
        ring = ring ? ring - 1 : width - 1;
      };
      each_tap<edge>(width, add);
      if (edge && last) total += load(last + offset, block_lanes(block, v));
      store(to + offset, total, block_lanes(block, v));
    }
    slot = slot + 1 < width ? slot + 1 : 0;
  };
  int64_t t = 0;
  for (; t < past; ++t) step(t, AtEdge{});
  for (; t < c.time; ++t) step(t, Inside{});
  for (; t < c.time + past; ++t) step(t, AtEdge{});

  for (int64_t v = 0; v < vectors; ++v) {
    const int lanes = block_lanes(block, v);
    store(dbias + block.channel + v * kLanes, sum[v], lanes);
    for (int64_t k = 0; k < width; ++k) {
      float tap[kLanes];
      store(tap, dtaps[k * vectors + v]);
      for (int i = 0; i < lanes; ++i) dweight[(block.channel + v * kLanes + i) * width + k] = tap[i];
    }
  }
  return HCMEN_OK;
}

static int conv_backward(const hcmen_conv& c, const hcmen_conv_grad& grad, float* dweight, float* dbias,
                         const ChannelBlock& block) {
  switch (c.width) {
    case 2: return conv_backward_typed<2>(c, grad, dweight, dbias, block);
    case 3: return conv_backward_typed<3>(c, grad, dweight, dbias, block);
    case 4: return conv_backward_typed<4>(c, grad, dweight, dbias, block);
    default: return conv_backward_typed<0>(c, grad, dweight, dbias, block);
  }
}

}  // namespace HCMEN_ISA_NAMESPACE
}  // namespace hcmen

#endif  // HCMEN_CAUSAL_CONV1D_INL_H_
