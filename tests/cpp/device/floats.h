#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <limits>
#include <random>
#include <type_traits>
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

// The arithmetic of a storage type.
template <typename S>
using Math = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <typename S>
std::vector<S> normal(int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> distribution;
  std::vector<S> values(size);
  for (S& value : values) value = static_cast<S>(distribution(random));
  return values;
}

// Multiples of 1/4: sums of their squares are exact, so that equal ones are ties.
template <typename S>
std::vector<S> few_distinct(int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<S> values(size);
  for (S& value : values) value = static_cast<S>((static_cast<double>(random() % 9) - 4) / 4);
  return values;
}

using FloatingTypes = ::testing::Types<float, double, c10::Half, c10::BFloat16>;

}  // namespace cctorch::device
