// What the tests of the kernels have in common: arrays of exactly their size, numbers for them, and comparisons.
#ifndef HCMEN_KERNELS_TEST_H_
#define HCMEN_KERNELS_TEST_H_

#include <math.h>
#include <stdint.h>
#include <stdio.h>

#include <memory>
#include <string>
#include <vector>

namespace hcmen::test {

inline int failures = 0;

inline void fail(const std::string& what, double got, double expected) {
  printf("FAILED %s: got %.9g, expected %.9g\n", what.c_str(), got, expected);
  ++failures;
}

// A heap block of exactly `count` elements.
template <class T>
struct Array {
  std::unique_ptr<T[]> data;
  int64_t count;
  explicit Array(int64_t n) : data(new T[(size_t)n]()), count(n) {}
  T& operator[](int64_t i) { return data[(size_t)i]; }
};

inline uint64_t seed = 1;
inline double uniform() {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return (double)(seed >> 40) / (double)(1 << 24);
}
inline double normal() { return sqrt(-2 * log(uniform() + 1e-9)) * cos(6.283185307179586 * uniform()); }

inline double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double value = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
  return bits & 0x8000 ? -value : value;
}

// To nearest among finite values; the inputs of these tests are far from the ends of the range.
inline uint16_t half_bits(double value) {
  const double size = fabs(value);
  int low = 0, high = 0x7bff;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    half_value((uint16_t)middle) <= size ? low = middle : high = middle - 1;
  }
  if (low < 0x7bff && half_value((uint16_t)(low + 1)) - size < size - half_value((uint16_t)low)) ++low;
  return (uint16_t)(low | (value < 0 ? 0x8000 : 0));
}

// A series in both forms: what the kernel gets, and the values in double.
struct Input {
  Array<float> single;
  Array<uint16_t> half;
  std::vector<double> value;
  bool is_half;

  Input(int64_t count, bool half_form, double mean)
      : single(half_form ? 0 : count), half(half_form ? count : 0), value((size_t)count), is_half(half_form) {
    for (int64_t i = 0; i < count; ++i) {
      if (is_half) {
        half[i] = half_bits(mean + normal());
        value[(size_t)i] = half_value(half[i]);
      } else {
        single[i] = (float)(mean + normal());
        value[(size_t)i] = single[i];
      }
    }
  }
  const void* get() { return is_half ? (const void*)half.data.get() : (const void*)single.data.get(); }
};

inline double softplus(double x) { return x > 20 ? x : log1p(exp(x)); }
inline double sigmoid(double x) { return 1 / (1 + exp(-x)); }

inline void compare(const std::string& name, Array<float>& got, const std::vector<double>& want, double bound) {
  double largest = 1e-30, error = 0;
  for (double x : want) largest = fmax(largest, fabs(x));
  for (int64_t i = 0; i < got.count; ++i) {
    const double difference = fabs(got[i] - want[(size_t)i]);
    if (!(difference <= error)) error = difference;
  }
  if (!(error <= bound * largest)) fail(name, error / largest, bound);
}

// The state space dual at awkward sizes (kernels_test_dual.cc).
void test_duals();

}  // namespace hcmen::test

#endif  // HCMEN_KERNELS_TEST_H_
