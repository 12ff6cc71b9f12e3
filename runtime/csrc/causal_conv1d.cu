// The causal convolution on a CUDA device: neighbouring threads take neighbouring channels, each thread a run of steps.
//
// For widths 2 to 4 the inputs that a step needs slide through registers, so that each is read once (and once more by
// the next run, for as many steps as the filter reaches back). Any other width reads them from memory, where they are
// cached. In the backward pass the gradients of the weights are summed within each run, then over the runs from partial
// sums in the workspace, in a fixed order.
#include "cuda_launch.h"
#include "scan_step.h"

namespace hcmen {
namespace cuda {
namespace {

constexpr int kThreads = 128;
// Loads of a thread that are under way together.
constexpr int kLoadsAtOnce = 8;

struct ConvArguments {
  hcmen_conv c;
  hcmen_conv_grad g;
  int64_t run, runs;       // steps of a thread; runs of a sequence
  int64_t channel_blocks;
  float* parts;            // backward: [batch * runs, width + 1, channel], the gradient of the bias last
  float* slopes;           // backward at any width: gradient before the activation, [batch, time, channel]
};

struct Run {
  int64_t batch, number, channel, begin, end;  // steps [begin, end) in scanning order
  bool there;
};

__device__ __forceinline__ Run my_run(const ConvArguments& a) {
  Run r;
  int64_t index = blockIdx.x;
  r.channel = index % a.channel_blocks * kThreads + threadIdx.x;
  index /= a.channel_blocks;
  r.number = index % a.runs;
  r.batch = index / a.runs;
  r.begin = r.number * a.run;
  r.end = r.begin + a.run < a.c.time ? r.begin + a.run : a.c.time;
  r.there = r.channel < a.c.channel;
  return r;
}

// Where the step scanned as number `index` lies.
__device__ __forceinline__ int64_t offset_of(const hcmen_conv& c, const Run& r, int64_t index) {
  return (r.batch * c.time + step::place(index, c.time, c.reverse)) * c.channel + r.channel;
}

template <class T>
__device__ __forceinline__ float input_at(const hcmen_conv& c, const Run& r, int64_t index) {
  if (index < 0 || index >= c.time) return 0.0f;
  return widened(static_cast<const T*>(c.x)[offset_of(c, r, index)]);
}

// Row `number` of a state, which lies in scanning order whatever the direction.
__device__ __forceinline__ int64_t state_offset(const hcmen_conv& c, const Run& r, int64_t number) {
  return (r.batch * (c.width - 1) + number) * c.channel + r.channel;
}

// As `input_at`; what was before the first step is the initial state.
template <class T>
__device__ __forceinline__ float input_or_state_at(const hcmen_conv& c, const Run& r, int64_t index) {
  if (index >= 0) return input_at<T>(c, r, index);
  return c.initial_state ? c.initial_state[state_offset(c, r, c.width - 1 + index)] : 0.0f;
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) conv_forward_kernel(const ConvArguments a) {
  const hcmen_conv& c = a.c;
  const Run r = my_run(a);
  if (!r.there) return;
  float weight[kWidth], window[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) weight[k] = c.weight[r.channel * kWidth + k];
  const float bias = c.bias[r.channel];
#pragma unroll
  for (int k = 0; k < kWidth - 1; ++k) window[k + 1] = input_or_state_at<T>(c, r, r.begin - (kWidth - 1) + k);
  T* const y = static_cast<T*>(c.y);
  for (int64_t first = r.begin; first < r.end; first += kLoadsAtOnce) {
    float x[kLoadsAtOnce];
#pragma unroll
    for (int q = 0; q < kLoadsAtOnce; ++q) x[q] = input_at<T>(c, r, first + q);
#pragma unroll
    for (int q = 0; q < kLoadsAtOnce; ++q) {
      if (first + q >= r.end) break;
#pragma unroll
      for (int k = 0; k < kWidth - 1; ++k) window[k] = window[k + 1];
      window[kWidth - 1] = x[q];
      narrow(step::activated(step::convolve(window, weight, bias), c.silu), y + offset_of(c, r, first + q));
    }
  }
  if (!c.last_state || r.end < c.time) return;
#pragma unroll
  for (int k = 0; k < kWidth - 1; ++k) c.last_state[state_offset(c, r, k)] = window[k + 1];
}

// The convolution before the activation, at any width.
template <class T>
__device__ __forceinline__ float convolved(const hcmen_conv& c, const Run& r, int64_t index) {
  float sum = c.bias[r.channel];
  // Unrolled, the two places an input may lie in cost sm_90 24 bytes of spills.
#pragma unroll 1
  for (int64_t k = 0; k < c.width; ++k) {
    sum = fmaf(c.weight[r.channel * c.width + k], input_or_state_at<T>(c, r, index - (c.width - 1) + k), sum);
  }
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) conv_forward_any_kernel(const ConvArguments a) {
  const Run r = my_run(a);
  if (!r.there) return;
  for (int64_t i = r.begin; i < r.end; ++i) {
    narrow(step::activated(convolved<T>(a.c, r, i), a.c.silu), static_cast<T*>(a.c.y) + offset_of(a.c, r, i));
  }
  if (!a.c.last_state || r.end < a.c.time) return;
  const int64_t past = a.c.width - 1;
  for (int64_t k = 0; k < past; ++k) {
    a.c.last_state[state_offset(a.c, r, k)] = input_or_state_at<T>(a.c, r, a.c.time - past + k);
  }
}

// Where the gradient of the input of step `index` goes, which is before the first one for the initial state; null where
// nobody wants it. And what the last state adds to it.
__device__ __forceinline__ float* input_gradient(const ConvArguments& a, const Run& r, int64_t index) {
  if (index >= 0) return a.g.dx + offset_of(a.c, r, index);
  return a.g.dinitial_state ? a.g.dinitial_state + state_offset(a.c, r, a.c.width - 1 + index) : nullptr;
}
__device__ __forceinline__ float from_last_state(const ConvArguments& a, const Run& r, int64_t index) {
  const int64_t number = index - (a.c.time - (a.c.width - 1));
  return a.g.dlast_state && number >= 0 ? a.g.dlast_state[state_offset(a.c, r, number)] : 0.0f;
}

// kStates: gradients of states come or go. Looking for them costs each round of the others a seventh of its instructions.
template <int kWidth, bool kStates>
__global__ void __launch_bounds__(kThreads) conv_backward_kernel(const ConvArguments a) {
  const hcmen_conv& c = a.c;
  const Run r = my_run(a);
  if (!r.there) return;
  float weight[kWidth], window[kWidth], slopes[kWidth], dweight[kWidth], dbias = 0.0f;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    weight[k] = c.weight[r.channel * kWidth + k];
    slopes[k] = dweight[k] = 0.0f;
  }
  const float bias = c.bias[r.channel];
#pragma unroll
  for (int k = 0; k < kWidth - 1; ++k) window[k + 1] = input_or_state_at<float>(c, r, r.begin - (kWidth - 1) + k);
  // A step's input reaches kWidth - 1 steps further than the step itself.
  const int64_t end = r.end + kWidth - 1;
  for (int64_t first = r.begin; first < end; first += kLoadsAtOnce) {
    float x[kLoadsAtOnce], dy[kLoadsAtOnce];
#pragma unroll
    for (int q = 0; q < kLoadsAtOnce; ++q) {
      x[q] = input_at<float>(c, r, first + q);
      dy[q] = first + q < c.time ? a.g.dy[offset_of(c, r, first + q)] : 0.0f;
    }
#pragma unroll
    for (int q = 0; q < kLoadsAtOnce; ++q) {
      const int64_t i = first + q, j = i - (kWidth - 1);
      if (i >= end) break;
#pragma unroll
      for (int k = 0; k < kWidth - 1; ++k) {
        window[k] = window[k + 1];
        slopes[k] = slopes[k + 1];
      }
      window[kWidth - 1] = x[q];
      // Past the end of time dy is zero, and what the window holds does not count.
      slopes[kWidth - 1] = dy[q] * step::activated_slope(step::convolve(window, weight, bias), c.silu);
      if (i < r.end) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) dweight[k] = fmaf(slopes[kWidth - 1], window[k], dweight[k]);
        dbias += slopes[kWidth - 1];
      }
      // The first run has the initial state too.
      if ((j >= r.begin || (kStates && r.begin == 0)) && j < r.end) {
        float* const to = kStates ? input_gradient(a, r, j) : a.g.dx + offset_of(c, r, j);
        if (kStates && !to) continue;
        float dx = kStates ? from_last_state(a, r, j) : 0.0f;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) dx = fmaf(weight[k], slopes[kWidth - 1 - k], dx);
        *to = dx;
      }
    }
  }
  float* const part = a.parts + (r.batch * a.runs + r.number) * (kWidth + 1) * c.channel + r.channel;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) part[k * c.channel] = dweight[k];
  part[kWidth * c.channel] = dbias;
}

__global__ void __launch_bounds__(kThreads) conv_slopes_any_kernel(const ConvArguments a) {
  const Run r = my_run(a);
  if (!r.there) return;
  for (int64_t i = r.begin; i < r.end; ++i) {
    const int64_t offset = offset_of(a.c, r, i);
    a.slopes[offset] = a.g.dy[offset] * step::activated_slope(convolved<float>(a.c, r, i), a.c.silu);
  }
}

__global__ void __launch_bounds__(kThreads) conv_backward_any_kernel(const ConvArguments a) {
  const hcmen_conv& c = a.c;
  const Run r = my_run(a);
  if (!r.there) return;
  // The first run has the initial state too.
  const int64_t first = r.begin == 0 && a.g.dinitial_state ? -(c.width - 1) : r.begin;
  for (int64_t i = first; i < r.end; ++i) {
    float dx = from_last_state(a, r, i);
#pragma unroll 1
    for (int64_t k = 0; k < c.width && i + c.width - 1 - k >= 0; ++k) {
      const int64_t later = i + c.width - 1 - k;
      if (later < c.time) dx = fmaf(c.weight[r.channel * c.width + k], a.slopes[offset_of(c, r, later)], dx);
    }
    *input_gradient(a, r, i) = dx;
  }
  float* const part = a.parts + (r.batch * a.runs + r.number) * (c.width + 1) * c.channel + r.channel;
  for (int64_t k = 0; k < c.width; ++k) {
    float sum = 0.0f;
#pragma unroll 2
    for (int64_t i = r.begin; i < r.end; ++i) {
      sum = fmaf(a.slopes[offset_of(c, r, i)], input_or_state_at<float>(c, r, i - (c.width - 1) + k), sum);
    }
    part[k * c.channel] = sum;
  }
  float dbias = 0.0f;
  for (int64_t i = r.begin; i < r.end; ++i) dbias += a.slopes[offset_of(c, r, i)];
  part[c.width * c.channel] = dbias;
}

// --- host -----------------------------------------------------------------------------------------------------------

int check_sizes(const hcmen_conv& c) {
  if (!all_positive({c.batch, c.time, c.channel, c.width})) return HCMEN_BAD_ARGUMENT;
  if (c.dtype != HCMEN_FLOAT32 && c.dtype != HCMEN_FLOAT16) return HCMEN_BAD_ARGUMENT;
  if (c.width == 1 && (c.initial_state || c.last_state)) return HCMEN_BAD_ARGUMENT;
  if (!addressable({c.batch, c.time, c.channel}) || !addressable({c.channel, c.width + 1}) ||
      !addressable({c.batch, c.channel, c.width + 1, 513}) || !addressable({c.time, c.width})) {
    return HCMEN_BAD_ARGUMENT;
  }
  return HCMEN_OK;
}

// The steps of a thread. Long runs read the edges seldom, short ones give a small problem more threads. In the backward
// pass there are at most some 512 runs, whose partial sums are added up one after the other.
int plan(const hcmen_conv& c, bool backward, ConvArguments* a) {
  a->channel_blocks = ceil_div(c.channel, kThreads);
  const int64_t columns = c.batch * a->channel_blocks;
  a->run = 64;
  while (a->run > 8 && columns * ceil_div(c.time, a->run) < 512) a->run /= 2;
  if (backward) {
    const int64_t most_runs = c.batch >= 512 ? 1 : ceil_div(512, c.batch), least = ceil_div(c.time, most_runs);
    if (a->run < least) a->run = least;
  }
  a->runs = ceil_div(c.time, a->run);
  return check_blocks((double)columns * (double)a->runs);
}

int64_t rounded(int64_t floats) { return ceil_div(floats, 4) * 4; }

bool fast_width(const hcmen_conv& c) { return c.width >= 2 && c.width <= 4; }

int64_t backward_floats(const ConvArguments& a) {
  const hcmen_conv& c = a.c;
  return rounded(c.batch * a.runs * (c.width + 1) * c.channel) +
         (fast_width(c) ? 0 : rounded(c.batch * c.time * c.channel));
}

template <class T>
int forward(const ConvArguments& a, void* stream) {
  const int64_t blocks = a.c.batch * a.runs * a.channel_blocks;
  switch (a.c.width) {
    case 2: return launch(conv_forward_kernel<T, 2>, blocks, kThreads, 0, stream, a);
    case 3: return launch(conv_forward_kernel<T, 3>, blocks, kThreads, 0, stream, a);
    case 4: return launch(conv_forward_kernel<T, 4>, blocks, kThreads, 0, stream, a);
    default: return launch(conv_forward_any_kernel<T>, blocks, kThreads, 0, stream, a);
  }
}

template <int kWidth>
auto backward_kernel(const ConvArguments& a) -> void (*)(ConvArguments) {
  return a.g.dlast_state || a.g.dinitial_state ? conv_backward_kernel<kWidth, true> : conv_backward_kernel<kWidth, false>;
}

int backward(const ConvArguments& a, void* stream) {
  const hcmen_conv& c = a.c;
  const int64_t blocks = c.batch * a.runs * a.channel_blocks;
  int status = HCMEN_OK;
  switch (c.width) {
    case 2: status = launch(backward_kernel<2>(a), blocks, kThreads, 0, stream, a); break;
    case 3: status = launch(backward_kernel<3>(a), blocks, kThreads, 0, stream, a); break;
    case 4: status = launch(backward_kernel<4>(a), blocks, kThreads, 0, stream, a); break;
    default:
      status = launch(conv_slopes_any_kernel, blocks, kThreads, 0, stream, a);
      if (status == HCMEN_OK) status = launch(conv_backward_any_kernel, blocks, kThreads, 0, stream, a);
  }
  if (status) return status;
  const int64_t count = c.batch * a.runs, stride = (c.width + 1) * c.channel, weights = c.width * c.channel;
  if (const int failure = sum_parts({a.parts, count, stride, weights, c.channel, a.g.dweight}, stream)) return failure;
  return sum_parts({a.parts + weights, count, stride, c.channel, 0, a.g.dbias}, stream);
}

}  // namespace

int load_convolution_kernels() {
  return load_kernels(conv_forward_kernel<float, 2>, conv_forward_kernel<float, 3>, conv_forward_kernel<float, 4>,
                      conv_forward_any_kernel<float>, conv_forward_kernel<__half, 2>, conv_forward_kernel<__half, 3>,
                      conv_forward_kernel<__half, 4>, conv_forward_any_kernel<__half>, conv_backward_kernel<2, false>,
                      conv_backward_kernel<3, false>, conv_backward_kernel<4, false>, conv_backward_kernel<2, true>,
                      conv_backward_kernel<3, true>, conv_backward_kernel<4, true>, conv_slopes_any_kernel,
                      conv_backward_any_kernel);
}

}  // namespace cuda
}  // namespace hcmen

extern "C" {

HCMEN_API int hcmen_cuda_causal_conv1d_workspace(const hcmen_conv* conv, int backward, int64_t* bytes) {
  using namespace hcmen::cuda;
  if (!conv || !bytes) return HCMEN_BAD_ARGUMENT;
  if (const int status = check_sizes(*conv)) return status;
  ConvArguments a{};
  a.c = *conv;
  if (const int status = plan(*conv, backward != 0, &a)) return status;
  *bytes = backward ? backward_floats(a) * (int64_t)sizeof(float) : 0;
  return HCMEN_OK;
}

HCMEN_API int hcmen_cuda_causal_conv1d_forward(const hcmen_conv* conv, const hcmen_cuda_launch* launch) {
  using namespace hcmen::cuda;
  if (!conv || !launch) return HCMEN_BAD_ARGUMENT;
  if (const int status = check_sizes(*conv)) return status;
  if (!conv->x || !conv->weight || !conv->bias || !conv->y) return HCMEN_BAD_ARGUMENT;
  ConvArguments a{};
  a.c = *conv;
  if (const int status = plan(*conv, false, &a)) return status;
  return conv->dtype == HCMEN_FLOAT16 ? forward<__half>(a, launch->stream) : forward<float>(a, launch->stream);
}

HCMEN_API int hcmen_cuda_causal_conv1d_backward(const hcmen_conv* conv, const hcmen_conv_grad* grad,
                                                const hcmen_cuda_launch* launch) {
  using namespace hcmen::cuda;
  if (!conv || !grad || !launch) return HCMEN_BAD_ARGUMENT;
  if (const int status = check_sizes(*conv)) return status;
  if (!conv->x || !conv->weight || !conv->bias || conv->dtype != HCMEN_FLOAT32) return HCMEN_BAD_ARGUMENT;
  if (!grad->dy || !grad->dx || !grad->dweight || !grad->dbias) return HCMEN_BAD_ARGUMENT;
  if (conv->width == 1 && (grad->dlast_state || grad->dinitial_state)) return HCMEN_BAD_ARGUMENT;
  ConvArguments a{};
  a.c = *conv;
  a.g = *grad;
  if (const int status = plan(*conv, true, &a)) return status;
  const int64_t floats = backward_floats(a);
  if (launch->workspace_bytes < floats * (int64_t)sizeof(float)) return HCMEN_SMALL_WORKSPACE;
  if (!launch->workspace || !aligned(launch->workspace, 16)) return HCMEN_BAD_ARGUMENT;
  a.parts = static_cast<float*>(launch->workspace);
  if (!fast_width(*conv)) a.slopes = a.parts + rounded(conv->batch * a.runs * (conv->width + 1) * conv->channel);
  return backward(a, launch->stream);
}

}  // extern "C"
