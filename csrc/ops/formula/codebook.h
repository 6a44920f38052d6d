#pragma once

#include <cmath>
#include <limits>

#include "csrc/ops/formula/host_device.h"

namespace cctorch::formula {

// NaN is the least: in ascending order it comes first, and all is nearest to it, as for argmin.
template <typename T>
CCTORCH_HOST_DEVICE bool comes_before(T a, T b) {
  return a < b || (std::isnan(a) && !std::isnan(b));
}

// What lies halfway between two values, rounded down: whether x is above stays exactly the same. The sum of the halves
// rounds in float64 too, to `near`; `missed` is what that left out (Knuth's TwoSum).
template <typename T>
CCTORCH_HOST_DEVICE T bound_between(T below, T above) {
  const double low = static_cast<double>(below) / 2, high = static_cast<double>(above) / 2;
  const double near = low + high, of_high = near - low;
  const double missed = (low - (near - of_high)) + (high - of_high);
  const T bound = static_cast<T>(near);
  const double excess = static_cast<double>(bound) - near;
  const bool too_high = excess > 0 || (excess == 0 && missed < 0);
  return too_high ? std::nextafter(bound, -std::numeric_limits<T>::infinity()) : bound;
}

}  // namespace cctorch::formula
