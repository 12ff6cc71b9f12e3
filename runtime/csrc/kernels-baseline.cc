#define HCMEN_ISA_NAMESPACE baseline
#define HCMEN_ISA_NAME "baseline"
#define HCMEN_ISA_TABLE kBaselineKernels
#include "kernels-inl.h"
