// Checks of sizes shared by the C functions, and the mark of an exported one. Internal.
#ifndef HCMEN_CHECKS_H_
#define HCMEN_CHECKS_H_

#include <stdint.h>

#include <initializer_list>

namespace hcmen {

inline bool all_positive(std::initializer_list<int64_t> sizes) {
  for (int64_t size : sizes) {
    if (size < 1) return false;
  }
  return true;
}

// Whether a float32 array of these sizes, and a few times its bytes, fits the address space.
inline bool addressable(std::initializer_list<int64_t> sizes) {
  int64_t elements = 1;
  for (int64_t size : sizes) {
    if (__builtin_mul_overflow(elements, size, &elements)) return false;
  }
  return elements < INTPTR_MAX / 64;
}

}  // namespace hcmen

#endif  // HCMEN_CHECKS_H_
