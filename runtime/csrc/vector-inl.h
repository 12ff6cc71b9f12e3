// Vectors of float32 and the elementary functions over them, for the instruction set this translation unit is compiled
// for. Included by the kernels-*.cc files only, each of which sets HCMEN_ISA_NAMESPACE.
//
// Everything here is static and inlined, and no standard C++ header is included: an inline function with external
// linkage, compiled here with wide instructions, could be the copy the linker keeps for the whole library.
#ifndef HCMEN_VECTOR_INL_H_
#define HCMEN_VECTOR_INL_H_

#ifndef HCMEN_ISA_NAMESPACE
#error "include this from a kernels-*.cc file"
#endif

#include <stddef.h>
#include <stdint.h>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define HCMEN_NEON 1
#endif

#define HCMEN_INLINE static inline __attribute__((always_inline))
#define HCMEN_APART static __attribute__((noinline))
#define HCMEN_MEMBER inline __attribute__((always_inline))

namespace hcmen {
namespace HCMEN_ISA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F __attribute__((vector_size(kLanes * 4)));
typedef int32_t I __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U __attribute__((vector_size(kLanes * 4)));
typedef float LooseF __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

HCMEN_INLINE F splat(float x) {
#if defined(__AVX512F__)
  return (F)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (F)_mm256_set1_ps(x);
#elif defined(HCMEN_NEON)
  return (F)vdupq_n_f32(x);  // no instruction where a product can take the lane from memory; the sum below is one
#else
  return F{} + x;
#endif
}

HCMEN_INLINE I splat_int(int32_t x) { return I{} + x; }
HCMEN_INLINE F load(const float* p) { return *(const LooseF*)p; }
HCMEN_INLINE void store(float* p, F x) { *(LooseF*)p = x; }

// The first `count` lanes, the others zero; reads nothing beyond them.
HCMEN_INLINE F load(const float* p, int count) {
  if (count >= kLanes) return load(p);
#if defined(__AVX512F__)
  return (F)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#elif defined(HCMEN_NEON)
  float32x4_t x = vdupq_n_f32(0.0f);
  if (count > 0) x = vld1q_lane_f32(p, x, 0);
  if (count > 1) x = vld1q_lane_f32(p + 1, x, 1);
  if (count > 2) x = vld1q_lane_f32(p + 2, x, 2);
  return (F)x;
#else
  F x = {};
  for (int i = 0; i < count; ++i) x[i] = p[i];
  return x;
#endif
}

HCMEN_INLINE void store(float* p, F x, int count) {
  if (count >= kLanes) return store(p, x);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)x);
#elif defined(HCMEN_NEON)
  if (count > 0) vst1q_lane_f32(p, (float32x4_t)x, 0);
  if (count > 1) vst1q_lane_f32(p + 1, (float32x4_t)x, 1);
  if (count > 2) vst1q_lane_f32(p + 2, (float32x4_t)x, 2);
#else
  for (int i = 0; i < count; ++i) p[i] = x[i];
#endif
}

#if defined(__FMA__) || defined(__AVX512F__) || defined(HCMEN_NEON)
#define HCMEN_FUSED 1
#endif

// a * b + c. Fused where the instruction set has it.
HCMEN_INLINE F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(HCMEN_NEON)
  return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// a * b - c
HCMEN_INLINE F fms(F a, F b, F c) {
#if defined(__AVX512F__)
  return (F)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (F)_mm256_fmsub_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return fma(a, b, -c);
#endif
}

// c - a * b
HCMEN_INLINE F fnma(F a, F b, F c) {
#if defined(__AVX512F__)
  return (F)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (F)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(HCMEN_NEON)
  return (F)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return fma(-a, b, c);
#endif
}

// Lane-wise `a < b ? a : b` and `a > b ? a : b`: b where either is NaN.
HCMEN_INLINE F lesser(F a, F b) {
#if defined(__AVX512F__)
  return (F)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (F)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

HCMEN_INLINE F greater(F a, F b) {
#if defined(__AVX512F__)
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (F)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

HCMEN_INLINE F absolute(F x) { return (F)((I)x & splat_int(0x7fffffff)); }

HCMEN_INLINE F minus_absolute(F x) { return (F)((I)x | splat_int((int32_t)0x80000000)); }

// The larger magnitude, as bits: an order in which infinity and then NaN come above every number.
HCMEN_INLINE I magnitude_max(I largest, F x) {
  const I bits = (I)absolute(x);
  return largest > bits ? largest : bits;
}

// Whether a * b < limit in every lane; a NaN says no.
HCMEN_INLINE bool all_products_below(F a, F b, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)(a * b), _mm512_set1_ps(limit), _CMP_LT_OQ) == 0xffff;
#elif defined(HCMEN_NEON)
  return vminvq_u32((uint32x4_t)(a * b < splat(limit))) != 0;
#else
  const I below = a * b < splat(limit);
  int32_t all = -1;
  for (int i = 0; i < kLanes; ++i) all &= below[i];
  return all != 0;
#endif
}

HCMEN_INLINE float horizontal_sum(F x) {
  // Halves are folded together, so the order of additions is fixed by the lane count alone.
  float lanes[kLanes];
  __builtin_memcpy(lanes, &x, sizeof lanes);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Even lanes of a, then of b; and the odd ones.
#if defined(__AVX512F__)
#define HCMEN_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define HCMEN_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__AVX2__)
#define HCMEN_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define HCMEN_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define HCMEN_EVEN 0, 2, 4, 6
#define HCMEN_ODD 1, 3, 5, 7
#endif

HCMEN_INLINE F even_lanes(F a, F b) { return __builtin_shufflevector(a, b, HCMEN_EVEN); }
HCMEN_INLINE F odd_lanes(F a, F b) { return __builtin_shufflevector(a, b, HCMEN_ODD); }

#undef HCMEN_EVEN
#undef HCMEN_ODD

// sums[i] = sum over the lanes of x[i], for kLanes vectors, which are overwritten. Neighbours are added, then
// neighbouring pairs, and so on: every sum in the same order.
HCMEN_INLINE F sums_of_lanes(F* x) {
#pragma GCC unroll 4
  for (int count = kLanes / 2; count > 0; count /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      const F a = x[2 * i], b = x[2 * i + 1];
      x[i] = even_lanes(a, b) + odd_lanes(a, b);
    }
  }
  return x[0];
}

// Rows become columns.
HCMEN_INLINE void transpose(F* square) {
  // log2(kLanes) perfect shuffles.
#if defined(__AVX512F__)
#define HCMEN_ZIP_FIRST 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HCMEN_ZIP_SECOND 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define HCMEN_ZIP_FIRST 0, 8, 1, 9, 2, 10, 3, 11
#define HCMEN_ZIP_SECOND 4, 12, 5, 13, 6, 14, 7, 15
#else
#define HCMEN_ZIP_FIRST 0, 4, 1, 5
#define HCMEN_ZIP_SECOND 2, 6, 3, 7
#endif
#pragma GCC unroll 4
  for (int done = 1; done < kLanes; done *= 2) {
    F next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shufflevector(square[i], square[i + kLanes / 2], HCMEN_ZIP_FIRST);
      next[2 * i + 1] = __builtin_shufflevector(square[i], square[i + kLanes / 2], HCMEN_ZIP_SECOND);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) square[i] = next[i];
  }
#undef HCMEN_ZIP_FIRST
#undef HCMEN_ZIP_SECOND
}

// --- exponentials ---------------------------------------------------------------------------------------------------

// Adding and subtracting this rounds a float32 below 2^22 to the nearest integer, which the low bits of the sum hold.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23

// 2^x is taken apart as 2^n * 2^f, n the nearest multiple of 2^-kTableBits. Where one instruction looks up as many
// floats as a vector holds, the fractions of n come from a table of 2^(j / kLanes), and the polynomial for 2^f is short:
// 10 operations instead of 11 with AVX-512, and on AVX2 8 instead of 10 for the two units that multiply; above all the
// chain of operations that wait for each other is half as long.
#if defined(__AVX512F__)
constexpr int kTableBits = 4;
#elif defined(__AVX2__)
constexpr int kTableBits = 3;
#else
constexpr int kTableBits = 0;
#endif
static_assert(kTableBits == 0 || 1 << kTableBits == kLanes, "an index is a lane");

// Adding and subtracting this rounds to a multiple of 2^-kTableBits, whose low bits the sum holds.
constexpr float kRoundPart = kRound / (1 << kTableBits);
constexpr float kLargestFraction = 0.5f / (1 << kTableBits);

#if defined(__AVX2__) || defined(__AVX512F__)
// 2^(j / kLanes).
alignas(64) constexpr float kPowers[kLanes] = {
#if defined(__AVX512F__)
    0x1.000000p+0f, 0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f,
    0x1.306fe0p+0f, 0x1.3dea64p+0f, 0x1.4bfdaep+0f, 0x1.5ab07ep+0f,
    0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f, 0x1.9c4918p+0f,
    0x1.ae89fap+0f, 0x1.c199bep+0f, 0x1.d5818ep+0f, 0x1.ea4afap+0f,
#else
    0x1.000000p+0f, 0x1.172b84p+0f, 0x1.306fe0p+0f, 0x1.4bfdaep+0f,
    0x1.6a09e6p+0f, 0x1.8ace54p+0f, 0x1.ae89fap+0f, 0x1.d5818ep+0f,
#endif
};

// Lane i of the result: the lane of `table` that the low bits of index[i] name.
HCMEN_INLINE I look_up(I table, I index) {
#if defined(__AVX512F__)
  return (I)_mm512_permutexvar_epi32((__m512i)index, (__m512i)table);
#else
  return (I)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)index);
#endif
}
#endif

// p * 2^n rounded down to a whole power, for a multiple n of 2^-kTableBits of any size: correctly rounded into the
// subnormals, infinity on overflow; NaN where n is NaN.
HCMEN_INLINE F scale_by_power(F p, F n) {
#if defined(__AVX512F__)
  return (F)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // In two factors: 2^n alone leaves the range of normal numbers before the product does.
  const F bounded = lesser(greater(n, splat(-160.0f)), splat(160.0f));
  const I whole = ((I)(bounded + kRoundPart) - (I)splat(kRoundPart)) >> kTableBits;
  const I half = whole >> 1;
  const F scaled = p * (F)((half + 127) << 23) * (F)((whole - half + 127) << 23);
  const I is_nan = n != n;
  return (F)(((I)n & is_nan) | ((I)scaled & ~is_nan));
#endif
}

// Bounds |f|, and replaces a NaN (which infinite arguments leave behind) by a bound: `scale_by_power` decides there.
HCMEN_INLINE F bound(F f, float limit) {
#if defined(HCMEN_NEON)
  return (F)vmaxnmq_f32(vminnmq_f32((float32x4_t)f, vdupq_n_f32(limit)), vdupq_n_f32(-limit));
#else
  return greater(lesser(f, splat(limit)), splat(-limit));
#endif
}

// The largest |d * a| that exp2_product<false> accepts: products with 2^n there stay clear of the subnormals.
constexpr float kFastExponent = 100.0f;

// 2^f for |f| <= 1/2 (or a little more), where there is no table. All polynomials here are minimax, with a relative error
// of 2e-9 (5e-10 on AVX2) and the constant term 1.
HCMEN_INLINE F exp2_fraction(F f) {
  F p = splat(0x1.41fd02p-13f);
  p = fma(p, f, splat(0x1.5f3e2cp-10f));
  p = fma(p, f, splat(0x1.3b2d4ap-7f));
  p = fma(p, f, splat(0x1.c6aee8p-5f));
  p = fma(p, f, splat(0x1.ebfbdcp-3f));
  p = fma(p, f, splat(0x1.62e430p-1f));
  return fma(p, f, splat(1.0f));
}

// t * 2^f for |f| <= kLargestFraction (or a little more).
HCMEN_INLINE F times_exp2(F t, F f) {
#if defined(__AVX512F__)
  const F q = fma(fma(splat(0x1.c6ac70p-5f), f, splat(0x1.ebfff4p-3f)), f, splat(0x1.62e430p-1f));
  return fma(t * f, q, t);
#elif defined(__AVX2__)
  F q = fma(splat(0x1.3b26bap-7f), f, splat(0x1.c6be22p-5f));
  q = fma(q, f, splat(0x1.ebfbe2p-3f));
  q = fma(q, f, splat(0x1.62e430p-1f));
  return fma(t * f, q, t);
#else
  return t * exp2_fraction(f);
#endif
}

#if defined(__AVX2__) || defined(__AVX512F__)
// 2^(n + more), where `shifted` is n + kRoundPart as its addition left it, and the result a normal number.
HCMEN_INLINE F look_up_power(F shifted, int more) {
  constexpr int kShift = 23 - kTableBits;
  // The table without what its index adds when it is shifted along with the whole part of n.
  I table = (I)load(kPowers);
  for (int j = 0; j < kLanes; ++j) table[j] += (more << 23) - (j << kShift);
  // Unsigned: the bits of a NaN may go over.
  return (F)((U)look_up(table, (I)shifted) + ((U)shifted << kShift));
}
#endif

// 2^(n + f), where `shifted` is n + kRoundPart as its addition left it.
HCMEN_INLINE F exp2_of_parts(F shifted, F n, F f) {
#if defined(__AVX2__) || defined(__AVX512F__)
  const F t = (F)look_up((I)load(kPowers), (I)shifted);
#else
  const F t = splat(1.0f);
  (void)shifted;
#endif
  return scale_by_power(times_exp2(t, f), n);
}

// 2^(d * a): within 1 unit in the last place of the exact power of the exact product (1.25, and of the rounded
// product, where there is no fused multiply-add).
//
// The product is never rounded: both its integral part and the rest come out of fused multiply-adds (without them, on
// the baseline, the rounded product is used). Around 0 there is no table and the polynomial has the constant term 1, so
// 1 - 2^x keeps its relative accuracy for small x: states that decay slowly do not drift.
// With `safe` false |d * a| must be below kFastExponent; both ways give the same bits there.
template <bool safe>
HCMEN_INLINE F exp2_product(F d, F a) {
  const F shifted = fma(d, a, splat(kRoundPart));
  const F n = shifted - kRoundPart;
#if defined(HCMEN_NEON)
  // The same bits without a negation: NEON's fused operations add or subtract a * b.
  const F f = fma(d, a, kRoundPart - shifted);
#else
  const F f = fms(d, a, n);
#endif
  if (safe) return exp2_of_parts(shifted, n, bound(f, kLargestFraction));
#if defined(__AVX2__) || defined(__AVX512F__)
  return times_exp2(look_up_power(shifted, 0), f);
#else
  return (F)((I)times_exp2(splat(1.0f), f) + ((I)shifted << 23));
#endif
}

// log2(e) in two parts.
constexpr float kLog2e = 0x1.715476p+0f;
constexpr float kLog2eRest = 0x1.4ae0cp-26f;

// e^x: at most 1 unit in the last place from the exact value (1.51 without fused multiply-adds), subnormals included
// and 0 below them; infinity above the range; NaN for NaN.
HCMEN_INLINE F exponential(F x) {
#if defined(HCMEN_FUSED)
  const F shifted = fma(x, splat(kLog2e), splat(kRoundPart)), n = shifted - kRoundPart;
  const F f = bound(fma(x, splat(kLog2eRest), fms(x, splat(kLog2e), n)), 1.02f * kLargestFraction);
#else
  // ln 2 in two parts, the first with trailing zeros: its product with n is exact.
  const F shifted = x * kLog2e + kRound, n = shifted - kRound;
  const F f = bound((x - n * 0x1.62e400p-1f - n * 0x1.7f7d1cp-20f) * kLog2e, 0.51f);
#endif
  return exp2_of_parts(shifted, n, f);
}

// The same for x of 0 and below, for less.
HCMEN_INLINE F exponential_of_negative(F x) {
#if defined(__AVX512F__)
  x = greater(splat(-104.0f), x);  // e^-104 rounds to 0; x second: a NaN stays
  const F shifted = fma(x, splat(kLog2e), splat(kRoundPart)), n = shifted - kRoundPart;
  return exp2_of_parts(shifted, n, fma(x, splat(kLog2eRest), fms(x, splat(kLog2e), n)));
#elif defined(__AVX2__)
  x = greater(splat(-104.0f), x);
  const F shifted = fma(x, splat(kLog2e), splat(kRoundPart)), n = shifted - kRoundPart;
  const F f = fma(x, splat(kLog2eRest), fms(x, splat(kLog2e), n));
  // 2^64 times as much is a normal number.
  return times_exp2(look_up_power(shifted, 64), f) * splat(0x1p-64f);
#elif defined(HCMEN_NEON)
  x = (F)vmaxq_f32((float32x4_t)x, vdupq_n_f32(-104.0f));  // a NaN stays, and goes through both products
  const F shifted = fma(x, splat(kLog2e), splat(kRoundPart));
  const F f = fma(x, splat(kLog2eRest), fma(x, splat(kLog2e), kRoundPart - shifted));
  // 2^64 times as much is a normal number.
  return exp2_fraction(f) * (F)(((I)shifted << 23) + ((127 + 64) << 23)) * splat(0x1p-64f);
#else
  return exponential(x);
#endif
}

// log(1 + e) for e in [0, 1]: e + e^2 q(e), q minimax of degree 8 (relative error 5e-9).
HCMEN_INLINE F log1p_unit(F e) {
  F q = splat(-0x1.b43b0ep-9f);
  q = fma(q, e, splat(0x1.4bc624p-6f));
  q = fma(q, e, splat(-0x1.d91ceap-5f));
  q = fma(q, e, splat(0x1.b5dc76p-4f));
  q = fma(q, e, splat(-0x1.3a9958p-3f));
  q = fma(q, e, splat(0x1.936812p-3f));
  q = fma(q, e, splat(-0x1.ff294cp-3f));
  q = fma(q, e, splat(0x1.554e10p-2f));
  q = fma(q, e, splat(-0x1.ffffd4p-2f));
  return fma(q * e, e, e);
}

// The larger of x and 0, NaN for NaN.
HCMEN_INLINE F positive_part(F x) {
#if defined(HCMEN_NEON)
  return (F)vmaxq_f32((float32x4_t)x, vdupq_n_f32(0.0f));
#else
  return greater(splat(0.0f), x);  // x second: a NaN stays
#endif
}

// log(1 + e^x). Above 20, where the definition says x, this is x to the last bit of float32; far below zero it is e^x,
// with the relative accuracy of `exponential`. Within 2.34 units in the last place.
HCMEN_INLINE F softplus(F x) { return log1p_unit(exponential_of_negative(minus_absolute(x))) + positive_part(x); }

// y / x for x in [1, 2], NaN for NaN; within 0.6 units in the last place. Division of the widest vectors is slow.
HCMEN_INLINE F quotient(F y, F x) {
#if defined(__AVX512F__)
  const F rough = (F)_mm512_rcp14_ps((__m512)x), nearly = y * rough;
  return fma(fnma(x, nearly, y), rough, nearly);
#else
  return y / x;
#endif
}

// 1 / (1 + e^-x) from e^-|x|.
HCMEN_INLINE F sigmoid_from(F x, F e) {
  const I negative = (I)x >> 31;
  const F top = (F)((negative & (I)e) | (~negative & (I)splat(1.0f)));
  return quotient(top, e + 1.0f);
}

// 1 / (1 + e^-x), and x times it; relative accuracy at both ends (3.1 and 3.95 units in the last place).
HCMEN_INLINE F sigmoid(F x) { return sigmoid_from(x, exponential_of_negative(minus_absolute(x))); }
HCMEN_INLINE F silu(F x) { return x * sigmoid(x); }

// softplus(x), and its slope in `slope`.
HCMEN_INLINE F softplus(F x, F* slope) {
  const F e = exponential_of_negative(minus_absolute(x));
  *slope = sigmoid_from(x, e);
  return log1p_unit(e) + positive_part(x);
}

// Asks for a line of memory that is needed soon; any address will do.
HCMEN_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// Stores that go to memory without reading the line first and leave the caches alone, as a long memcpy's do. `p` is a
// multiple of the vector's size. Others see them after `past_caches_done`.
#if defined(__SSE2__)
constexpr bool kStoresPastCaches = true;
#else
constexpr bool kStoresPastCaches = false;
#endif

HCMEN_INLINE void store_past_caches(float* p, F x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x);
#elif defined(__SSE2__)
  _mm_stream_ps(p, (__m128)x);
#else
  store(p, x);
#endif
}

HCMEN_INLINE void past_caches_done() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// --- half precision -------------------------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};

#if !defined(__AVX2__) && !defined(__AVX512F__) && !defined(HCMEN_NEON)
// IEEE binary16 to binary32 in integers: exact, and indifferent to flush-to-zero modes.
HCMEN_INLINE float widen(Half half) {
  const uint32_t sign = (uint32_t)(half.bits & 0x8000) << 16;
  uint32_t rest = half.bits & 0x7fff;
  uint32_t bits;
  if (rest >= 0x7c00) {
    bits = 0x7f800000 | (rest & 0x3ff) << 13 | ((rest & 0x3ff) ? 0x400000 : 0);
  } else if (rest >= 0x400) {
    bits = (rest << 13) + (112u << 23);
  } else if (rest) {
    const int shift = __builtin_clz(rest) - 21;
    bits = ((rest << shift & 0x3ff) << 13) + ((uint32_t)(113 - shift) << 23);
  } else {
    bits = 0;
  }
  bits |= sign;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// Binary32 to binary16, to nearest, ties to even.
HCMEN_INLINE Half narrow(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00 | (bits >> 13 & 0x3ff);
  } else if (bits >= 0x47800000) {  // 65536 and above; 65520 to 65536 round up to infinity by the carry below
    half = 0x7c00;
  } else if (bits >= 0x38800000) {
    half = (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
  } else if (bits >= 0x33000000) {  // from half the least subnormal
    const int shift = 126 - (int)(bits >> 23);
    const uint32_t mantissa = (bits & 0x7fffff) | 0x800000;
    half = (mantissa + (1u << (shift - 1)) - 1 + (mantissa >> shift & 1)) >> shift;
  } else {
    half = 0;
  }
  return Half{(uint16_t)(sign | half)};
}
#endif

#if defined(HCMEN_NEON)
HCMEN_INLINE F load(const Half* p, int count) {
  uint16x4_t halves = vdup_n_u16(0);
  if (count >= kLanes) {
    halves = vld1_u16(&p->bits);
  } else {
    if (count > 0) halves = vld1_lane_u16(&p[0].bits, halves, 0);
    if (count > 1) halves = vld1_lane_u16(&p[1].bits, halves, 1);
    if (count > 2) halves = vld1_lane_u16(&p[2].bits, halves, 2);
  }
  return (F)vcvt_f32_f16(vreinterpret_f16_u16(halves));
}

// Rounds as the thread does, which is to nearest in a kernel (FloatEnvironment). Flush to zero does not reach halves.
HCMEN_INLINE void store(Half* p, F x, int count) {
  const uint16x4_t halves = vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x));
  if (count >= kLanes) return vst1_u16(&p->bits, halves);
  if (count > 0) vst1_lane_u16(&p[0].bits, halves, 0);
  if (count > 1) vst1_lane_u16(&p[1].bits, halves, 1);
  if (count > 2) vst1_lane_u16(&p[2].bits, halves, 2);
}
#else
HCMEN_INLINE F load(const Half* p, int count) {
#if defined(__AVX512F__)
  if (count >= kLanes) return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  if (count >= kLanes) return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
  Half lanes[kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)lanes));
#elif defined(__AVX2__)
  return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)lanes));
#else
  F x = {};
  for (int i = 0; i < kLanes; ++i) x[i] = widen(lanes[i]);
  return x;
#endif
}

HCMEN_INLINE void store(Half* p, F x, int count) {
  Half lanes[kLanes];
#if defined(__AVX512F__)
  const __m256i halves = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  if (count >= kLanes) return _mm256_storeu_si256((__m256i*)p, halves);
  _mm256_storeu_si256((__m256i*)lanes, halves);
#elif defined(__AVX2__)
  const __m128i halves = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  if (count >= kLanes) return _mm_storeu_si128((__m128i*)p, halves);
  _mm_storeu_si128((__m128i*)lanes, halves);
#else
  for (int i = 0; i < kLanes; ++i) lanes[i] = narrow(x[i]);
#endif
  for (int i = 0; i < count && i < kLanes; ++i) p[i] = lanes[i];
}
#endif

// Conversion of a whole array to float32.
HCMEN_INLINE void widen_array(const Half* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i, kLanes));
  if (i < count) store(to + i, load(from + i, (int)(count - i)), (int)(count - i));
}

// --- working memory -------------------------------------------------------------------------------------------------

// One allocation, handed out in pieces: vectors first, then floats. Built-ins, since the standard headers are barred.
class Scratch {
 public:
  HCMEN_MEMBER Scratch(int64_t vectors, int64_t floats) {
    const size_t bytes = (size_t)vectors * sizeof(F) + (size_t)floats * sizeof(float);
    base_ = (char*)__builtin_malloc(bytes + sizeof(F));
    next_ = (char*)(((uintptr_t)base_ + sizeof(F) - 1) / sizeof(F) * sizeof(F));
  }
  HCMEN_MEMBER ~Scratch() { __builtin_free(base_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  HCMEN_MEMBER bool works() const { return base_ != nullptr; }
  HCMEN_MEMBER F* vectors(int64_t count) { return (F*)take((size_t)count * sizeof(F)); }
  HCMEN_MEMBER float* floats(int64_t count) { return (float*)take((size_t)count * sizeof(float)); }

 private:
  HCMEN_MEMBER char* take(size_t bytes) {
    char* piece = next_;
    next_ += bytes;
    return piece;
  }

  char* base_;
  char* next_;
};

}  // namespace HCMEN_ISA_NAMESPACE
}  // namespace hcmen

#endif  // HCMEN_VECTOR_INL_H_
