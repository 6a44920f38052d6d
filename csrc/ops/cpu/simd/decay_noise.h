#pragma once

#include <cstdint>

#include "csrc/ops/cpu/simd/loops.h"

namespace cctorch::simd {

// y of n numbers x of one storage type, to the bit what ATen's operators on tensors of that type make of them.
struct DecayNoise {
  void (*scale)(const void* x, void* y, int64_t n, double factor);
  // x + amplitude u with u uniform in [-1, 1), of as many words of a generator; in float64 two for each number.
  void (*add_uniform)(const void* x, void* y, int64_t n, const uint32_t* words, double amplitude);
};

namespace baseline {
DecayNoise decay_noise(Storage storage);
}
namespace avx2 {
DecayNoise decay_noise(Storage storage);
}
namespace avx512 {
DecayNoise decay_noise(Storage storage);
}

}  // namespace cctorch::simd
