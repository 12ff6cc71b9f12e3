#define HCMEN_ISA_NAMESPACE avx2
#define HCMEN_ISA_NAME "avx2"
#define HCMEN_ISA_TABLE kAvx2Kernels
#include "kernels-inl.h"
