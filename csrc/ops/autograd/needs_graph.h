#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

namespace cctorch::autograd {

// Whether a call has to be recorded; a forward-mode tangent counts, so that Function can refuse it.
template <typename... Tensors>
bool needs_graph(const Tensors&... tensors) {
  return (at::GradMode::is_enabled() && (tensors.requires_grad() || ...)) || (tensors._fw_grad(0).defined() || ...);
}

inline bool any_needs_graph(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) { return needs_graph(tensor); });
}

}  // namespace cctorch::autograd
