#pragma once

#include <cstdint>

#include "csrc/ops/cpu/simd/loops.h"

namespace cctorch::simd {

// y = the nearest levels to x, n numbers of one storage type, of a grid of 2 q + 1 levels whose largest is max |x|, or
// the one of least squared error that a search finds.
using UniformGrid = void (*)(const void* x, void* y, int64_t n, double q, bool search);

namespace baseline {
UniformGrid uniform_grid(Storage storage);
}
namespace avx2 {
UniformGrid uniform_grid(Storage storage);
}
namespace avx512 {
UniformGrid uniform_grid(Storage storage);
}

}  // namespace cctorch::simd
