// The thread pool of the C interface. ONNX Runtime brings its own; this one serves callers that have none.
#ifndef HCMEN_PARALLEL_H_
#define HCMEN_PARALLEL_H_

#include <stdint.h>

namespace hcmen {

// Runs body(context, task) once for each task in [0, tasks), on at most `threads` threads of which the calling one is
// one, and returns when all are done. Workers persist and sleep when there is nothing to do. Callers on several
// threads may overlap; a body must not call this function. After a fork the child makes workers of its own. Where
// threads cannot be made, fewer do the work. `brief`: all tasks together take one thread less than some 100
// microseconds, for which sleeping workers are not woken unless such calls come in a row.
void parallel_for(int threads, int64_t tasks, void (*body)(void* context, int64_t task), void* context,
                  bool brief = false);

// The same for a callable `int (int64_t task)`; returns HCMEN_OK (0), or a task's other status if there was one.
template <class Body>
int parallel_tasks(int threads, int64_t tasks, Body body, bool brief = false) {
  struct Context {
    Body* body;
    int status;
  } context = {&body, 0};
  parallel_for(
      threads, tasks,
      [](void* opaque, int64_t task) {
        Context* own = (Context*)opaque;
        if (const int status = (*own->body)(task)) __atomic_store_n(&own->status, status, __ATOMIC_RELAXED);
      },
      &context, brief);
  return __atomic_load_n(&context.status, __ATOMIC_RELAXED);
}

}  // namespace hcmen

#endif  // HCMEN_PARALLEL_H_
