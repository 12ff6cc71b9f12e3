// What the kernels offer to the rest of this library (the C interface, the ONNX Runtime operators): a forward pass on
// whatever threads the caller has. Internal: nothing here is exported.
//
// Results do not depend on how the tasks are shared out, bit for bit: each output element is computed in one order, or
// computed again until it is what that order gives.
#ifndef HCMEN_KERNELS_H_
#define HCMEN_KERNELS_H_

#include <stdint.h>

#include "causal_conv1d.h"
#include "selective_scan.h"
#include "state_space_dual.h"

namespace hcmen {

// A caller's threads.
struct Threads {
  // How many may work at once. 1: the calling one alone, and `run` is not used; 0: not known.
  int most;
  // Calls task(context, i) once for each i in [0, tasks), on any thread and in any order, and returns when all have come
  // back: HCMEN_OK, or what one of them returned. `brief`: see parallel.h. May throw, then and not from a task.
  int (*run)(void* pool, int64_t tasks, int (*task)(void* context, int64_t index), void* context, bool brief);
  void* pool;
};

// Returns HCMEN_OK, HCMEN_NO_MEMORY, or what the C interface would return for arguments that no forward pass may run on
// (null pointers, sizes below 1, group or dtype that does not fit, products of sizes beyond the address space, no usable
// kernels). Tasks never throw, and leave the floating-point environment of their thread as it was.
int scan_forward(const hcmen_scan& scan, const Threads& threads);
int conv_forward(const hcmen_conv& conv, const Threads& threads);
int dual_forward(const hcmen_dual& dual, const Threads& threads);

// `count` threads of this library's own pool.
Threads own_threads(int count);

}  // namespace hcmen

#endif  // HCMEN_KERNELS_H_
