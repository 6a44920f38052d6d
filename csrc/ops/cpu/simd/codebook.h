#pragma once

#include <cstdint>

#include "csrc/ops/cpu/simd/loops.h"

namespace cctorch::simd {

// A codebook in ascending order, in the type of the arithmetic. What is not up to a bound, as NaN, is above it.
struct Codebook {
  const void* values;  // count
  const void* bounds;  // count - 1, between neighbours
  int64_t count;
};

// Loops over numbers of one storage type; `bounds` of a codebook may be read up to the next power of two less one.
struct CodebookLoops {
  // y = the value that has x between its bounds; NaN stays.
  void (*quantize)(void* y, const void* x, int64_t n, const Codebook& book, Stores stores);
  // Which of the ascending values that is.
  void (*cells)(int32_t* cells, const void* x, int64_t n, const Codebook& book);
  // To sums[i] the numbers of `values` whose x is in cell i; copies of sums and counts, one after the other, take
  // turns.
  void (*add)(const void* values, const void* x, int64_t n, const Codebook& book, double* sums, int64_t* counts);
};

// Additions to one place wait for each other.
constexpr int64_t kCopies = 4;

#define CCTORCH_DECLARE_LOOPS(isa)               \
  namespace isa {                                \
  CodebookLoops codebook_loops(Storage storage); \
  }

CCTORCH_DECLARE_LOOPS(baseline)
CCTORCH_DECLARE_LOOPS(avx2)
CCTORCH_DECLARE_LOOPS(avx512)
#undef CCTORCH_DECLARE_LOOPS

}  // namespace cctorch::simd
