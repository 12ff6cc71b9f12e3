/* A Mamba layer in C, without Python or a runtime: a causal convolution and a selective scan, step by step.
 *
 * Build it in the checkout. LIBRARY is libhcmen_ops.so, whose place hcmen-doctor tells:
 *
 *     cc -std=c11 -I runtime/csrc samples/cpp/stream.c LIBRARY -lm -o stream
 *     LD_LIBRARY_PATH=FOLDER_OF_LIBRARY ./stream
 *
 * It runs 100 steps at once, then the same one by one with states, and prints how far the two are apart: nothing.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "causal_conv1d.h"
#include "selective_scan.h"

enum { kTime = 100, kChannel = 48, kState = 16, kWidth = 4, kPast = kWidth - 1 };

/* What a layer has learned, and what it remembers between calls. */
static float conv_weight[kChannel][kWidth], conv_bias[kChannel], A[kChannel][kState], D[kChannel], delta_bias[kChannel];
struct memory {
  float conv[kPast][kChannel], scan[kChannel][kState];
};

/* In a model, projections give what varies from step to step. Here it is made up. */
static float x[kTime][kChannel], delta[kTime][kChannel], B[kTime][kState], C[kTime][kState], z[kTime][kChannel];

static void fill(float* to, int count, float low, float high) {
  static uint32_t seed = 1;
  for (int i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    to[i] = low + (high - low) * (float)(seed >> 8) / 16777216.0f;
  }
}

static void expect(int status, const char* what) {
  if (status == HCMEN_OK) return;
  fprintf(stderr, "%s: status %d%s%s\n", what, status, hcmen_ops_problem() ? ", " : "",
          hcmen_ops_problem() ? hcmen_ops_problem() : "");
  exit(1);
}

/* Steps [begin, begin + count) of the layer, from `memory` on, which is brought up to date. */
static void layer(int begin, int count, struct memory* memory, float* y) {
  float* const u = malloc(sizeof(float) * (size_t)count * kChannel);
  struct memory next;
  const hcmen_conv conv = {
      .batch = 1, .time = count, .channel = kChannel, .width = kWidth,
      .dtype = HCMEN_FLOAT32, .silu = 1,
      .x = x[begin], .weight = conv_weight[0], .bias = conv_bias, .initial_state = memory->conv[0],
      .y = u, .last_state = next.conv[0],
  };
  const hcmen_scan scan = {
      .batch = 1, .time = count, .channel = kChannel, .state = kState, .group = 1,
      .dtype = HCMEN_FLOAT32, .delta_softplus = 1,
      .u = u, .delta = delta[begin], .A = A[0], .B = B[begin], .C = C[begin], .D = D, .delta_bias = delta_bias,
      .z = z[begin], .initial_state = memory->scan[0],
      .y = y, .last_state = next.scan[0],
  };
  expect(hcmen_causal_conv1d_forward(&conv, 1), "the convolution");
  expect(hcmen_selective_scan_forward(&scan, 1), "the scan");
  *memory = next;
  free(u);
}

int main(void) {
  static float whole[kTime][kChannel], pieces[kTime][kChannel];
  fill(conv_weight[0], kChannel * kWidth, -0.5f, 0.5f);
  fill(conv_bias, kChannel, -0.1f, 0.1f);
  fill(A[0], kChannel * kState, -16.0f, -1.0f);
  fill(D, kChannel, 0.5f, 1.5f);
  fill(delta_bias, kChannel, -5.0f, -2.0f);
  fill(x[0], kTime * kChannel, -1.0f, 1.0f);
  fill(delta[0], kTime * kChannel, -1.0f, 1.0f);
  fill(B[0], kTime * kState, -1.0f, 1.0f);
  fill(C[0], kTime * kState, -1.0f, 1.0f);
  fill(z[0], kTime * kChannel, -1.0f, 1.0f);

  struct memory memory;
  memset(&memory, 0, sizeof memory);
  layer(0, kTime, &memory, whole[0]);
  memset(&memory, 0, sizeof memory);
  for (int t = 0; t < kTime; ++t) layer(t, 1, &memory, pieces[t]);

  float apart = 0.0f, largest = 0.0f;
  for (int i = 0; i < kTime * kChannel; ++i) {
    apart = fmaxf(apart, fabsf(whole[0][i] - pieces[0][i]));
    largest = fmaxf(largest, fabsf(whole[0][i]));
  }
  printf("%s kernels, version %d: %d steps at once and one by one differ by %g, the largest output is %.3f\n",
         hcmen_ops_isa(), hcmen_ops_version(), kTime, apart, largest);
  return apart == 0.0f && largest > 0.0f ? 0 : 1;
}
