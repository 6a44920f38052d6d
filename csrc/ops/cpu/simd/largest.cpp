#include "csrc/ops/cpu/simd/largest.h"

#include "csrc/ops/formula/fake_quant_weights.h"

namespace cctorch::simd::CCTORCH_ISA {
namespace {

template <typename Bits>
Bits of(const Bits* from, int64_t n, Bits infinity) {
  Bits largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const Bits key = formula::magnitude_of_number(from[i], infinity);
    largest = key > largest ? key : largest;
  }
  return largest;
}

}  // namespace

template <typename Bits>
Largest<Bits> largest() {
  return &of<Bits>;
}

template Largest<uint16_t> largest();
template Largest<uint32_t> largest();
template Largest<uint64_t> largest();

}  // namespace cctorch::simd::CCTORCH_ISA
