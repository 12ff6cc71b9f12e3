// What a test may ask of the emulation.
#include "cuda_emulation.h"
#include "selective_scan.h"

extern "C" {

HCMEN_API void emulation_set_order(int order) { emulation::order = static_cast<emulation::Order>(order); }

HCMEN_API uint64_t emulation_launches() { return emulation::launches; }
}
