#pragma once

#include <cmath>
#include <limits>

#include "csrc/ops/formula/parameters.h"

namespace cctorch::formula {

// exp(logarithm), kept in the normal range so that it is positive and finite for every finite logarithm.
template <typename T>
CCTORCH_HOST_DEVICE T positive(T logarithm) {
  const T value = std::exp(logarithm);
  const T low = std::numeric_limits<T>::min();
  const T high = std::numeric_limits<T>::max();
  return value < low ? low : (value > high ? high : value);
}

template <typename T>
CCTORCH_HOST_DEVICE T clamp(T value, T low, T high) {
  return value < low ? low : (value > high ? high : value);
}

// LSQ (Esser et al. 2020, eq. 1 to 3) with the scale given; the gradient is that of the scale's logarithm.
template <typename T>
struct FakeQuant {
  using value_type = T;
  using parameter_type = T;

  T qmin;
  T qmax;

  CCTORCH_HOST_DEVICE T parameter(T log_scale) const { return positive(log_scale); }

  CCTORCH_HOST_DEVICE T forward(T x, T s) const { return s * std::nearbyint(clamp(x / s, qmin, qmax)); }

  CCTORCH_HOST_DEVICE Gradients<T> backward(T grad, T x, T s) const {
    const T v = x / s;
    const T clamped = clamp(v, qmin, qmax);
    const T q = std::nearbyint(clamped);
    // grad * s may be infinite where their product with a small q - v is not.
    return {v == clamped ? grad : T(0), grad * (s * (v == clamped ? q - v : q))};
  }
};

// LSQ+ (Bhalgat et al. 2020, eq. 3 to 6): the same around an offset. The parameters are scale and offset.
template <typename T>
struct FakeQuantOffset {
  using value_type = T;
  using parameter_type = Pair<T>;

  FakeQuant<T> lsq;

  CCTORCH_HOST_DEVICE Pair<T> parameter(const Pair<T>& raw) const { return {positive(raw.first), raw.second}; }

  CCTORCH_HOST_DEVICE T forward(T x, const Pair<T>& p) const { return lsq.forward(x - p.second, p.first) + p.second; }

  CCTORCH_HOST_DEVICE Gradients<T, Pair<T>> backward(T grad, T x, const Pair<T>& p) const {
    const auto gradients = lsq.backward(grad, x - p.second, p.first);
    // Inside the range the offset that is taken off is put on again; outside only the latter is left.
    return {gradients.x, {gradients.parameter, grad - gradients.x}};
  }
};

// PACT (Choi et al. 2018, eq. 1 to 3): the forward of LSQ on 0 to `levels`, with another gradient: that of the clipping
// alone. The parameter is the scale alpha / levels, the gradient that of alpha's logarithm.
template <typename T>
struct Pact {
  using value_type = T;
  using parameter_type = T;

  T levels;

  CCTORCH_HOST_DEVICE T parameter(T log_alpha) const {
    const T s = positive(log_alpha) / levels;
    return s < std::numeric_limits<T>::min() ? std::numeric_limits<T>::min() : s;
  }

  CCTORCH_HOST_DEVICE T forward(T x, T s) const { return FakeQuant<T>{T(0), levels}.forward(x, s); }

  CCTORCH_HOST_DEVICE Gradients<T> backward(T grad, T x, T s) const {
    const T v = x / s;
    const bool above = v >= levels;
    return {v >= T(0) && !above ? grad : T(0), above ? grad * (s * levels) : T(0)};
  }
};

}  // namespace cctorch::formula
