#pragma once

#include <cmath>

#include "csrc/ops/formula/parameters.h"

namespace cctorch::formula {

// sign(x) relu(|x| - threshold) (STR, Kusupati et al. 2020, eq. 3). NaN passes through.
template <typename T>
struct SoftThreshold {
  using value_type = T;
  using parameter_type = T;

  CCTORCH_HOST_DEVICE T parameter(T threshold) const { return threshold; }

  CCTORCH_HOST_DEVICE T forward(T x, T threshold) const {
    const T left = std::abs(x) - threshold;
    const T y = x < 0 ? -left : left;
    return left <= 0 ? T(0) : y;
  }

  CCTORCH_HOST_DEVICE Gradients<T> backward(T grad, T x, T threshold) const {
    const T kept = std::abs(x) - threshold <= 0 ? T(0) : grad;
    return {kept, x < 0 ? kept : -kept};
  }
};

}  // namespace cctorch::formula
