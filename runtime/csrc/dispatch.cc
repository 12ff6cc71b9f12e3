#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernel_table.h"
#if defined(HCMEN_WITH_X86_KERNELS)
#include <cpuid.h>
#endif
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace hcmen {
namespace {

struct Level {
  const KernelTable* table;
  bool (*runs_here)();
};

bool always() { return true; }

#if defined(HCMEN_WITH_X86_KERNELS)
bool has_avx2() {
  unsigned a, b, c, d;
  const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  // __builtin_cpu_supports also asks whether the operating system saves these registers.
  return has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Best first.
const Level kLevels[] = {
#if defined(HCMEN_WITH_X86_KERNELS)
    {&kAvx512Kernels, has_avx512},
    {&kAvx2Kernels, has_avx2},
#endif
    {&kBaselineKernels, always},
};

struct Choice {
  const KernelTable* table = nullptr;
  char problem[200] = "";

  Choice() {
    const char* wanted = getenv("HCMEN_ISA");
    const bool any = !wanted || !*wanted;
    for (const Level& level : kLevels) {
      if (!any && strcmp(wanted, level.table->name) != 0) continue;
      if (level.runs_here()) {
        table = level.table;
        return;
      }
      if (!any) {
        snprintf(problem, sizeof problem, "HCMEN_ISA is '%s', which this machine cannot run: unset it", wanted);
        return;
      }
    }
    char names[64] = "";
    for (const Level& level : kLevels) {
      const size_t used = strlen(names);
      snprintf(names + used, sizeof names - used, "%s%s", used ? ", " : "", level.table->name);
    }
    snprintf(problem, sizeof problem, "HCMEN_ISA is '%.40s', expected one of %s: unset it", wanted, names);
  }
};

const Choice& choice() {
  static const Choice made;
  return made;
}

}  // namespace

const KernelTable* kernels() { return choice().table; }
const char* kernels_problem() { return kernels() ? nullptr : choice().problem; }

const KernelTable* kernels_at(int index) {
  for (const Level& level : kLevels) {
    if (level.runs_here() && index-- == 0) return level.table;
  }
  return nullptr;
}

#if defined(__SSE2__)
FloatEnvironment::FloatEnvironment() : saved_(_mm_getcsr()) {
  _mm_setcsr(0x9fc0);  // all exceptions masked, round to nearest, flush to zero, subnormals are zeros
}
FloatEnvironment::~FloatEnvironment() { _mm_setcsr((unsigned)saved_); }
#elif defined(__aarch64__)
FloatEnvironment::FloatEnvironment() {
  __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
  const uint64_t ours = 1u << 24;  // flush to zero; round to nearest, no traps
  __asm__ volatile("msr fpcr, %0" : : "r"(ours));
}
FloatEnvironment::~FloatEnvironment() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }
#else
FloatEnvironment::FloatEnvironment() : saved_(0) {}
FloatEnvironment::~FloatEnvironment() {}
#endif

}  // namespace hcmen
