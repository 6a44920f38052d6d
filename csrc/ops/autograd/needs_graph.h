#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

namespace cctorch::autograd {

// Whether a call has to be recorded; a forward-mode tangent counts, so that Function can refuse it.
template <typename... Tensors>
bool needs_graph(const Tensors&... tensors) {
  return (at::GradMode::is_enabled() && (tensors.requires_grad() || ...)) || (tensors._fw_grad(0).defined() || ...);
}

}  // namespace cctorch::autograd
