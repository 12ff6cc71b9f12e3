// One kernel of hcmen/mamba/trt_aot.cu on the host, for tests/mamba/test_trt_aot.py: its addresses come in the order of its
// parameters. Compiled with the macros of the kernel.
#include "trt_aot.cu"

extern "C" void launch_aot(unsigned blocks, void* const* tensors, int batch, int time, int order) {
  emulation::order = static_cast<emulation::Order>(order);
  void* const* next = tensors;
  const auto elements = [&] { return static_cast<Element*>(*next++); };
  const auto floats = [&] { return static_cast<float*>(*next++); };
#if defined(HCMEN_STATE)
  Element *const u = elements(), *const delta = elements();
  float* const A = floats();
  Element *const B = elements(), *const C = elements();
  float *const D = floats(), *const delta_bias = floats();
#if HCMEN_GATED
  Element* const z = elements();
#endif
#if HCMEN_STATEFUL
  float* const initial_state = floats();
#endif
  Element* const y = elements();
#if HCMEN_STATEFUL
  float* const last_state = floats();
#endif
  emulation::launch(blocks, HCMEN_THREADS, 0, [&] {
    HCMEN_KERNEL(u, delta, A, B, C, D, delta_bias,
#if HCMEN_GATED
                 z,
#endif
#if HCMEN_STATEFUL
                 initial_state,
#endif
                 batch, time, y
#if HCMEN_STATEFUL
                 ,
                 last_state
#endif
    );
  });
#else
  Element* const x = elements();
  float *const weight = floats(), *const bias = floats();
#if HCMEN_STATEFUL
  float* const initial_state = floats();
#endif
  Element* const y = elements();
#if HCMEN_STATEFUL
  float* const last_state = floats();
#endif
  emulation::launch(blocks, HCMEN_THREADS, 0, [&] {
    HCMEN_KERNEL(x, weight, bias,
#if HCMEN_STATEFUL
                 initial_state,
#endif
                 batch, time, y
#if HCMEN_STATEFUL
                 ,
                 last_state
#endif
    );
  });
#endif
}
