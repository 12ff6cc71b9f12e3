#define HCMEN_ISA_NAMESPACE avx512
#define HCMEN_ISA_NAME "avx512"
#define HCMEN_ISA_TABLE kAvx512Kernels
#include "kernels-inl.h"
