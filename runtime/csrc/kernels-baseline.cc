// What every processor of the architecture runs; on aarch64 that has NEON in it.
#define HCMEN_ISA_NAMESPACE baseline
#if defined(__aarch64__) && defined(__ARM_NEON)
#define HCMEN_ISA_NAME "neon"
#else
#define HCMEN_ISA_NAME "baseline"
#endif
#define HCMEN_ISA_TABLE kBaselineKernels
#include "kernels-inl.h"
