#pragma once

#include <cmath>
#include <limits>

#include "csrc/ops/formula/host_device.h"

namespace cctorch::formula {

// LSQ (Esser et al. 2020, eq. 1 to 3) with the scale given; the gradient is that of the scale's logarithm.
template <typename T>
struct FakeQuant {
  using value_type = T;

  T qmin;
  T qmax;

  // exp(log_scale), kept in the normal range so that it is positive and finite for every finite logarithm.
  CCTORCH_HOST_DEVICE static T scale(T log_scale) {
    const T s = std::exp(log_scale);
    const T low = std::numeric_limits<T>::min();
    const T high = std::numeric_limits<T>::max();
    return s < low ? low : (s > high ? high : s);
  }

  CCTORCH_HOST_DEVICE T forward(T x, T s) const { return s * std::nearbyint(clamp(x / s)); }

  CCTORCH_HOST_DEVICE Gradients<T> backward(T grad, T x, T s) const {
    const T v = x / s;
    const T clamped = clamp(v);
    const T q = std::nearbyint(clamped);
    return {v == clamped ? grad : T(0), grad * s * (v == clamped ? q - v : q)};
  }

 private:
  CCTORCH_HOST_DEVICE T clamp(T v) const { return v < qmin ? qmin : (v > qmax ? qmax : v); }
};

// The same with the logarithm as the parameter: the scale is computed where it is used.
template <typename T>
struct LogFakeQuant {
  using value_type = T;
  FakeQuant<T> lsq;

  CCTORCH_HOST_DEVICE T forward(T x, T log_scale) const { return lsq.forward(x, FakeQuant<T>::scale(log_scale)); }

  CCTORCH_HOST_DEVICE Gradients<T> backward(T grad, T x, T log_scale) const {
    return lsq.backward(grad, x, FakeQuant<T>::scale(log_scale));
  }
};

}  // namespace cctorch::formula
