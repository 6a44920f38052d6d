#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "csrc/ops/cpu/isa.h"
#include "csrc/ops/cpu/row_blocks.h"
#include "csrc/ops/cpu/simd/largest.h"

namespace cctorch::cpu {

// The bits of the largest magnitude up to `infinity`; 0 of none.
template <typename Bits>
Bits largest_magnitude(const Bits* from, int64_t n, Bits infinity) {
  const auto largest =
      for_isa(&simd::baseline::largest<Bits>, &simd::avx2::largest<Bits>, &simd::avx512::largest<Bits>)();
  if (n <= kRowBlock) return largest(from, n, infinity);
  std::vector<Bits> parts(row_blocks(n));
  for_each_block(
      n, [&](int64_t block, int64_t begin, int64_t size) { parts[block] = largest(from + begin, size, infinity); });
  return *std::max_element(parts.begin(), parts.end());
}

}  // namespace cctorch::cpu
