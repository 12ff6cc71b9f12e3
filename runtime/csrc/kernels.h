// What the kernels offer to the rest of this library (the C interface, the ONNX Runtime operators): a forward pass cut
// into tasks that any thread pool may run, in any order, on any number of threads. Internal: nothing here is exported.
//
// Results do not depend on how the tasks are shared out, bit for bit: each output element is computed by one task, in
// one order.
#ifndef HCMEN_KERNELS_H_
#define HCMEN_KERNELS_H_

#include <stdint.h>

#include "causal_conv1d.h"
#include "selective_scan.h"

namespace hcmen {

// HCMEN_OK if a forward pass may run on these arguments, else the code the C interface would return (null pointers,
// sizes below 1, group or dtype that does not fit, products of sizes beyond the address space, no usable kernels).
int scan_forward_check(const hcmen_scan& scan);
int conv_forward_check(const hcmen_conv& conv);

// The number of tasks, at least 1; exactly 1 when the work is too little to be worth sharing. The arguments must have
// passed the check above.
int64_t scan_forward_tasks(const hcmen_scan& scan);
int64_t conv_forward_tasks(const hcmen_conv& conv);

// Runs task `task` of the number above. Returns HCMEN_OK or HCMEN_NO_MEMORY. Never throws. Safe to call from any
// thread; the floating-point environment of the thread is as before on return.
int scan_forward_task(const hcmen_scan& scan, int64_t task);
int conv_forward_task(const hcmen_conv& conv, int64_t task);

}  // namespace hcmen

#endif  // HCMEN_KERNELS_H_
