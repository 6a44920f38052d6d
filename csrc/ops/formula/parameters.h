#pragma once

#include <cstdint>

#include "csrc/ops/formula/host_device.h"

namespace cctorch::formula {

// A formula has one parameter per channel, a number, or two of them, a Pair. Value-initialize a sum: Pair leaves its
// members alone, as shared memory of a kernel demands.
template <typename T>
struct Pair {
  T first;
  T second;

  CCTORCH_HOST_DEVICE Pair& operator+=(const Pair& other) {
    first += other.first;
    second += other.second;
    return *this;
  }
};

template <typename T>
CCTORCH_HOST_DEVICE Pair<T> operator*(const Pair<T>& pair, T factor) {
  return {pair.first * factor, pair.second * factor};
}

template <typename Parameter>
constexpr bool is_pair = false;
template <typename T>
constexpr bool is_pair<Pair<T>> = true;

// The parameters of consecutive elements: an array of numbers, for Pairs followed by another one of the same length.
// Interleaved they would not be vectorized.
template <typename T, typename Parameter>
struct Columns {
  T* numbers;
  int64_t length;

  CCTORCH_HOST_DEVICE Parameter operator[](int64_t i) const {
    if constexpr (is_pair<Parameter>) {
      return {numbers[i], numbers[length + i]};
    } else {
      return numbers[i];
    }
  }

  CCTORCH_HOST_DEVICE void add(int64_t i, const Parameter& value) const {
    if constexpr (is_pair<Parameter>) {
      numbers[i] += value.first;
      numbers[length + i] += value.second;
    } else {
      numbers[i] += value;
    }
  }
};

template <typename Parameter>
constexpr int64_t numbers_in = is_pair<Parameter> ? 2 : 1;

// Sums of parameters are kept in float64.
template <typename T>
CCTORCH_HOST_DEVICE double wide(T value) {
  return static_cast<double>(value);
}
template <typename T>
CCTORCH_HOST_DEVICE Pair<double> wide(const Pair<T>& pair) {
  return {static_cast<double>(pair.first), static_cast<double>(pair.second)};
}

template <typename Parameter>
using Wide = decltype(wide(Parameter{}));

template <typename Parameter>
struct Narrow {
  CCTORCH_HOST_DEVICE static Parameter from(double value) { return static_cast<Parameter>(value); }
};
template <typename T>
struct Narrow<Pair<T>> {
  CCTORCH_HOST_DEVICE static Pair<T> from(const Pair<double>& pair) {
    return {static_cast<T>(pair.first), static_cast<T>(pair.second)};
  }
};

template <typename T, typename Parameter = T>
struct Gradients {
  T x;
  Parameter parameter;
};

}  // namespace cctorch::formula
