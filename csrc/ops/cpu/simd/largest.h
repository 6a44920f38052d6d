#pragma once

#include <cstdint>

namespace cctorch::simd {

// The bits of the largest magnitude that is a number; 0 of none.
template <typename Bits>
using Largest = Bits (*)(const Bits* from, int64_t n, Bits infinity);

#define CCTORCH_DECLARE_LOOPS(isa)             \
  namespace isa {                              \
  template <typename Bits>                     \
  Largest<Bits> largest();                     \
  extern template Largest<uint16_t> largest(); \
  extern template Largest<uint32_t> largest(); \
  extern template Largest<uint64_t> largest(); \
  }

CCTORCH_DECLARE_LOOPS(baseline)
CCTORCH_DECLARE_LOOPS(avx2)
CCTORCH_DECLARE_LOOPS(avx512)
#undef CCTORCH_DECLARE_LOOPS

}  // namespace cctorch::simd
