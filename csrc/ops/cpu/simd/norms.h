#pragma once

#include <cstdint>

#include "csrc/ops/cpu/simd/loops.h"

namespace cctorch::simd {

// Sums of squares of numbers of one storage type, in double.
struct Norms {
  double (*square)(const void* a, int64_t n);
  double (*squared_distance)(const void* a, const void* b, int64_t n);
  // To sums[i] the square of a[i].
  void (*add_squares)(const void* a, int64_t n, double* sums);
};

namespace baseline {
Norms norms(Storage storage);
}
namespace avx2 {
Norms norms(Storage storage);
}
namespace avx512 {
Norms norms(Storage storage);
}

}  // namespace cctorch::simd
