// For tests: the functions of cuda_ops.h that the plugins call, over host memory, by the CPU kernels, so that the
// plugins' wiring can be tried on a machine without a GPU. A stream is a counter of launches; a negative one makes
// every launch fail.
#include <stdint.h>
#include <string.h>

#include "cuda_ops.h"

namespace {

int count_launch(void* stream) {
  int64_t* const launches = static_cast<int64_t*>(stream);
  if (!launches) return HCMEN_BAD_ARGUMENT;
  if (*launches < 0) return HCMEN_CUDA_FAILED;
  ++*launches;
  return HCMEN_OK;
}

// As a kernel would, counting the launch: a workspace that is too small, or that is something else as well, shows.
int use_workspace(int64_t bytes, const hcmen_cuda_launch* launch) {
  if (launch->workspace_bytes < bytes) return HCMEN_SMALL_WORKSPACE;
  if (bytes > 0 && !launch->workspace) return HCMEN_BAD_ARGUMENT;
  if (const int status = count_launch(launch->stream)) return status;
  if (bytes > 0) memset(launch->workspace, 0xa5, (size_t)bytes);
  return HCMEN_OK;
}

}  // namespace

extern "C" {

// Like a kernel that cuts a sequence into the more chunks the fewer sequences there are, and long ones not at all.
int hcmen_cuda_selective_scan_workspace(const hcmen_scan* scan, const hcmen_cuda_launch* launch, int backward,
                                        int64_t* bytes) {
  if (backward || scan->state > HCMEN_CUDA_FORWARD_STATES) return HCMEN_BAD_ARGUMENT;
  const int64_t chunks = 1 + 40 / scan->batch + scan->time % 7;
  const bool whole = (launch && launch->steps_per_chunk < 0) || scan->time < 4;
  *bytes = whole ? 0 : scan->batch * scan->channel * scan->state * chunks * 8;
  return HCMEN_OK;
}

int hcmen_cuda_selective_scan_forward(const hcmen_scan* scan, const hcmen_cuda_launch* launch) {
  int64_t bytes = 0;
  if (const int status = hcmen_cuda_selective_scan_workspace(scan, launch, 0, &bytes)) return status;
  if (const int status = use_workspace(bytes, launch)) return status;
  return hcmen_selective_scan_forward(scan, 1);
}

int hcmen_cuda_state_space_dual_workspace(const hcmen_dual* dual, const hcmen_cuda_launch* launch, int backward,
                                          int64_t* bytes) {
  hcmen_scan like = {};
  like.batch = dual->batch, like.time = dual->time, like.channel = dual->head * dual->head_dim, like.state = dual->state;
  return hcmen_cuda_selective_scan_workspace(&like, launch, backward, bytes);
}

int hcmen_cuda_state_space_dual_forward(const hcmen_dual* dual, const hcmen_cuda_launch* launch) {
  int64_t bytes = 0;
  if (const int status = hcmen_cuda_state_space_dual_workspace(dual, launch, 0, &bytes)) return status;
  if (const int status = use_workspace(bytes, launch)) return status;
  return hcmen_state_space_dual_forward(dual, 1);
}

int hcmen_cuda_causal_conv1d_forward(const hcmen_conv* conv, const hcmen_cuda_launch* launch) {
  if (const int status = count_launch(launch->stream)) return status;
  return hcmen_causal_conv1d_forward(conv, 1);
}

const char* hcmen_cuda_problem(void) { return "the stream is broken"; }
const char* hcmen_cuda_fix(void) { return "mend it"; }

}  // extern "C"
