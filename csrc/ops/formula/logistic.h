#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <numbers>

#include "csrc/ops/formula/host_device.h"

// sigmoid and tanh that a compiler turns into vectors; a device has instructions of its own for them.
namespace cctorch::formula {

// 1/k! + r/(k + 1)! + ... + r^(last - k)/last!
template <int k, int last, typename T>
CCTORCH_HOST_DEVICE T exponential_series(T r) {
  constexpr T coefficient = [] {
    double factorial = 1;
    for (int i = 2; i <= k; ++i) factorial *= i;
    return static_cast<T>(1 / factorial);
  }();
  if constexpr (k == last) {
    return coefficient;
  } else {
    return coefficient + r * exponential_series<k + 1, last>(r);
  }
}

template <typename T>
struct ExponentialParts;

// ln 2 is high + low, and a multiple of high by an exponent is exact. Added to `magic` a number is rounded to the
// integer that the last bits of the sum hold. Up to `largest` 2^n is a normal number, and the terms of the series that
// are left out are less than a rounding.
template <>
struct ExponentialParts<float> {
  using Bits = uint32_t;
  static constexpr float magic = 12582912.0F, high = 355.0F / 512, low = -2.12194440e-4F, largest = 87;
  static constexpr int digits = 23, terms = 7;
};

template <>
struct ExponentialParts<double> {
  using Bits = uint64_t;
  static constexpr double magic = 6755399441055744.0, high = 22713.0 / 32768, low = 1.42860682030941723212e-6,
                          largest = 708;
  static constexpr int digits = 52, terms = 13;
};

// e^x - 1 of an x that is cut off before the power leaves its type: sigmoid and tanh are then 0 or 1 but for less than
// 2^-125. With x = n ln 2 + r it is 2^n (e^r - 1) + 2^n - 1, near 0 as exact as far from it.
template <typename T>
CCTORCH_HOST_DEVICE T exponential_minus_1(T x) {
  using Parts = ExponentialParts<T>;
  using Bits = typename Parts::Bits;
  x = x < -Parts::largest ? -Parts::largest : x;
  x = x > Parts::largest ? Parts::largest : x;
  const T shifted = x * std::numbers::log2e_v<T> + Parts::magic;
  const T n = shifted - Parts::magic;
  const T r = x - n * Parts::high - n * Parts::low;
  const T one = 1;
  Bits bits = 0, bits_of_one = 0;
  std::memcpy(&bits, &shifted, sizeof(T));
  std::memcpy(&bits_of_one, &one, sizeof(T));
  bits = (bits << Parts::digits) + bits_of_one;
  T power = 0;
  std::memcpy(&power, &bits, sizeof(T));
  return power * (r + r * r * exponential_series<2, Parts::terms>(r)) + (power - 1);
}

template <typename T>
CCTORCH_HOST_DEVICE T sigmoid(T x) {
#ifdef __CUDA_ARCH__
  return 1 / (1 + std::exp(-x));
#else
  return 1 / (2 + exponential_minus_1(-x));
#endif
}

template <typename T>
CCTORCH_HOST_DEVICE T tanh(T x) {
#ifdef __CUDA_ARCH__
  return std::tanh(x);
#else
  const T e = exponential_minus_1(2 * x);
  return e / (e + 2);
#endif
}

}  // namespace cctorch::formula
