// What a test may ask of the emulation.
#include "cuda_emulation.h"
#include "selective_scan.h"

extern "C" {

HCMEN_API void emulation_set_order(int order) { emulation::order = static_cast<emulation::Order>(order); }

HCMEN_API uint64_t emulation_launches() { return emulation::launches; }

// From now on calls fail with `error`, the driver is of `driver`, a stream is being recorded; no kernel is loaded yet.
HCMEN_API void emulation_set(int error, int driver, int recording) {
  emulation::failure = static_cast<cudaError_t>(error);
  emulation::driver_version = driver;
  emulation::recording = recording != 0;
  emulation::loaded.clear();
}
}
