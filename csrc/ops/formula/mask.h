#pragma once

#include <cstdint>
#include <type_traits>

#include "csrc/ops/formula/host_device.h"

namespace cctorch::formula {

// The unsigned type that a floating type is compared as.
template <typename T>
using BitsOf = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

// The bits of |w|: an unsigned integer ordered as |w| is, with NaN above infinity.
template <typename Bits>
CCTORCH_HOST_DEVICE Bits magnitude(Bits bits) {
  return bits & static_cast<Bits>(~(Bits(1) << (8 * sizeof(Bits) - 1)));
}

// The magnitude where NaN has to have a place: all of them are equal, and the largest.
template <typename Bits>
struct MagnitudeOrNan {
  Bits infinity;

  CCTORCH_HOST_DEVICE Bits operator()(Bits bits) const {
    const Bits key = magnitude(bits);
    return key > infinity ? magnitude(static_cast<Bits>(~Bits(0))) : key;
  }
};

// Marks n of m weights: those that fewer than n others come before, larger ones or equal ones of lower index.
template <typename Bits, typename Key>
CCTORCH_HOST_DEVICE void mark_group(const Bits* from, bool* mask, int64_t n, int64_t m, int64_t stride,
                                    const Key& key) {
  for (int64_t i = 0; i < m; ++i) {
    const Bits own = key(from[i * stride]);
    int64_t before = 0;
    for (int64_t j = 0; j < m; ++j) {
      const Bits other = key(from[j * stride]);
      before += other > own || (other == own && j < i);
    }
    mask[i * stride] = before < n;
  }
}

}  // namespace cctorch::formula
