#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <limits>
#include <vector>

#include "csrc/ops/formula/mask.h"

namespace cctorch::device {

using formula::BitsOf;

template <typename T>
std::vector<BitsOf<T>> bits_of(const std::vector<T>& values) {
  std::vector<BitsOf<T>> bits;
  for (const T value : values) {
    if constexpr (sizeof(T) == 2) {
      bits.push_back(value.x);
    } else {
      bits.push_back(std::bit_cast<BitsOf<T>>(value));
    }
  }
  return bits;
}

template <typename T>
BitsOf<T> infinity_bits() {
  return bits_of<T>({std::numeric_limits<T>::infinity()})[0];
}

using FloatingTypes = ::testing::Types<float, double, c10::Half, c10::BFloat16>;

}  // namespace cctorch::device
