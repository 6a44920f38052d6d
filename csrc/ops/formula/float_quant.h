#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "csrc/ops/formula/fake_quant.h"

namespace cctorch::formula {

// Floating-point numbers of few bits, times a scale: to the nearest, a tie to the even mantissa, and saturating. The
// gradients are LSQ's on this grid: straight-through inside, and that of the scale's logarithm.
template <typename T>
struct FloatQuant {
  using value_type = T;
  using parameter_type = T;

  T largest;
  T smallest_normal;  // below it neighbours are as far apart as just above it
  T step;             // between neighbours from 1 to 2: 2^-mantissa bits

  CCTORCH_HOST_DEVICE T parameter(T log_scale) const { return positive(log_scale); }

  CCTORCH_HOST_DEVICE T forward(T x, T s) const { return s * rounded(clamp(x / s, -largest, largest)); }

  CCTORCH_HOST_DEVICE Gradients<T> backward(T grad, T x, T s) const {
    const T v = x / s;
    const T clamped = clamp(v, -largest, largest);
    const T q = rounded(clamped);
    return {v == clamped ? grad : T(0), grad * (s * (v == clamped ? q - v : q))};
  }

 private:
  CCTORCH_HOST_DEVICE T rounded(T v) const {
    const T power = power_of_two(v);
    const T apart = (power < smallest_normal ? smallest_normal : power) * step;
    return std::nearbyint(v / apart) * apart;
  }

  // The largest power of two up to |v|; infinity for NaN, 0 for denormals.
  CCTORCH_HOST_DEVICE static T power_of_two(T v) {
    using Bits = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;
    constexpr Bits exponent = std::is_same_v<T, double> ? Bits(0x7ff0000000000000) : Bits(0x7f800000);
    return __builtin_bit_cast(T, __builtin_bit_cast(Bits, v) & exponent);
  }
};

// INQ's largest power of two of a row, of its largest magnitude: the one that 4/3 of it reaches. 1 for a row of zeros
// and one with an infinity or NaN.
template <typename T>
CCTORCH_HOST_DEVICE T top_power(T largest) {
  if (!(largest > 0) || largest > std::numeric_limits<T>::max()) return T(1);
  int exponent = 0;
  const T fraction = std::frexp(largest, &exponent);
  const bool reached = fraction >= T(0.75) && exponent < std::numeric_limits<T>::max_exponent;
  return std::ldexp(T(1), reached ? exponent : exponent - 1);
}

}  // namespace cctorch::formula
