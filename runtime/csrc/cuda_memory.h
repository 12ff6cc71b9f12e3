// Device memory and streams for the ONNX Runtime operators, which are compiled without CUDA's headers. Internal.
#ifndef HCMEN_CUDA_MEMORY_H_
#define HCMEN_CUDA_MEMORY_H_

#include <stdint.h>

namespace hcmen {
namespace cuda {

// HCMEN_OK, or HCMEN_NO_MEMORY or HCMEN_CUDA_FAILED. Not to be called while `capturing`.
int allocate(int64_t bytes, void** memory);
void release(void* memory);

// Whether the work queued on `stream` is being recorded into a CUDA graph.
bool capturing(void* stream);

}  // namespace cuda
}  // namespace hcmen

#endif  // HCMEN_CUDA_MEMORY_H_
