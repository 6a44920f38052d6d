#pragma once

#include "csrc/ops/formula/parameters.h"

namespace cctorch::formula {

template <typename T>
struct ChannelGate {
  using value_type = T;
  using parameter_type = T;

  CCTORCH_HOST_DEVICE T forward(T x, T gate) const { return x * gate; }

  CCTORCH_HOST_DEVICE Gradients<T> backward(T grad, T x, T gate) const { return {grad * gate, grad * x}; }
};

}  // namespace cctorch::formula
