// The kernels of this library on a CUDA device, as C functions: libhcmen_ops_cuda.so.
//
// Structures and meaning are those of selective_scan.h, causal_conv1d.h and state_space_dual.h, with device pointers in
// them. Everything is
// queued on the caller's stream and nothing waits for the device; memory that a kernel needs besides is handed in, so
// that the calls may be captured into a CUDA graph. Arrays are dense and need the alignment of their elements alone.
//
// Every result is the same bit for bit from call to call: sums are taken in fixed orders, without atomic operations.
// Another plan (below) or another version of this library may round differently.
#ifndef HCMEN_CUDA_OPS_H_
#define HCMEN_CUDA_OPS_H_

#include <stdint.h>

#include "causal_conv1d.h"
#include "selective_scan.h"
#include "state_space_dual.h"

#ifdef __cplusplus
extern "C" {
#endif

// Return values besides those of selective_scan.h.
enum {
  HCMEN_CUDA_FAILED = 16,       // CUDA refused a launch: hcmen_cuda_problem says why
  HCMEN_SMALL_WORKSPACE = 17,   // less memory was handed in than hcmen_cuda_..._workspace asks for
  HCMEN_CUDA_TOO_LARGE = 18,    // more blocks than a grid has: hcmen_cuda_problem says how many
};

// The most states of a channel that the kernels serve.
enum { HCMEN_CUDA_FORWARD_STATES = 512, HCMEN_CUDA_BACKWARD_STATES = 256 };

typedef struct hcmen_cuda_launch {
  void* stream;             // a cudaStream_t; null is the default stream
  void* workspace;          // device memory, aligned to 16 bytes; may be null where 0 bytes are needed
  int64_t workspace_bytes;
  // How a scan is shared out. 0 leaves it to a rule of the sizes alone; see hcmen_cuda_plan.
  int64_t steps_per_chunk;  // steps that one block scans; -1: all of them, for which a forward scan needs no workspace.
                            // Backward, rounded up to a multiple of 8
  // Of a forward scan alone.
  int32_t lanes_per_channel;  // 1, 2, 4, 8, 16 or 32 lanes share the states of a channel
  int32_t time_warps;         // 1 to 16 warps of a block lie one after the other in time, unless there are chunks
  int32_t channel_warps;      // 1, 2 or 4 warps of a block lie side by side, where it has one in time
  int32_t steps_per_warp;     // steps of a tile where a block has one warp in time: a multiple of 4, at most 64
  // Of a backward scan alone: at most so many sequences are under way together and take workspace.
  int64_t sequences_at_once;
} hcmen_cuda_launch;

// What a forward scan does, for tests and benchmarks.
typedef struct hcmen_cuda_plan {
  int64_t steps_per_chunk, chunks, blocks;
  int32_t lanes_per_channel, states_per_lane, time_warps, channel_warps, steps_per_warp, shared_bytes;
} hcmen_cuda_plan;

// Bytes of workspace for a call with these arguments, which may be 0. `launch` may be null: no wishes. Pointers are not
// looked at, so they may be null; whether z, initial_state and the like are null does not matter.
HCMEN_API int hcmen_cuda_selective_scan_workspace(const hcmen_scan* scan, const hcmen_cuda_launch* launch,
                                                  int backward, int64_t* bytes);
HCMEN_API int hcmen_cuda_selective_scan_forward(const hcmen_scan* scan, const hcmen_cuda_launch* launch);
HCMEN_API int hcmen_cuda_selective_scan_backward(const hcmen_scan* scan, const hcmen_scan_grad* grad,
                                                 const hcmen_cuda_launch* launch);
HCMEN_API int hcmen_cuda_selective_scan_plan(const hcmen_scan* scan, const hcmen_cuda_launch* launch,
                                             hcmen_cuda_plan* plan);

HCMEN_API int hcmen_cuda_causal_conv1d_workspace(const hcmen_conv* conv, int backward, int64_t* bytes);
HCMEN_API int hcmen_cuda_causal_conv1d_forward(const hcmen_conv* conv, const hcmen_cuda_launch* launch);
HCMEN_API int hcmen_cuda_causal_conv1d_backward(const hcmen_conv* conv, const hcmen_conv_grad* grad,
                                                const hcmen_cuda_launch* launch);

// As those of the selective scan. A row of a head counts as a channel; a forward pass has no warps one after the other in
// time.
HCMEN_API int hcmen_cuda_state_space_dual_workspace(const hcmen_dual* dual, const hcmen_cuda_launch* launch,
                                                    int backward, int64_t* bytes);
HCMEN_API int hcmen_cuda_state_space_dual_forward(const hcmen_dual* dual, const hcmen_cuda_launch* launch);
HCMEN_API int hcmen_cuda_state_space_dual_backward(const hcmen_dual* dual, const hcmen_dual_grad* grad,
                                                   const hcmen_cuda_launch* launch);
HCMEN_API int hcmen_cuda_state_space_dual_plan(const hcmen_dual* dual, const hcmen_cuda_launch* launch,
                                               hcmen_cuda_plan* plan);

// The version of this C interface.
#define HCMEN_CUDA_OPS_VERSION 4
HCMEN_API int hcmen_cuda_ops_version(void);

// Loads every kernel of this library onto the current device, which else the first launch of each does. It may be called
// while a stream is being recorded into a CUDA graph. HCMEN_OK, or HCMEN_CUDA_FAILED.
HCMEN_API int hcmen_cuda_warm(void);

// What was wrong, and what to do about it, when a function of this library last returned HCMEN_CUDA_FAILED or
// HCMEN_CUDA_TOO_LARGE on this thread; empty before that. Parts of one line.
HCMEN_API const char* hcmen_cuda_problem(void);
HCMEN_API const char* hcmen_cuda_fix(void);

// Queues a kernel that does nothing, for benchmarks: what any launch costs.
HCMEN_API int hcmen_cuda_nothing(const hcmen_cuda_launch* launch);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // HCMEN_CUDA_OPS_H_
