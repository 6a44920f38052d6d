#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <optional>

#include "csrc/ops/formula/layout.h"

namespace cctorch::channelwise {

inline Layout layout(const at::Tensor& dense, std::optional<int64_t> axis) {
  if (!axis || dense.numel() == 0 || dense.size(*axis) == 1) return {1, 1, dense.numel()};
  const int64_t channels = dense.size(*axis);
  const int64_t inner = dense.stride(*axis);
  return {dense.numel() / (channels * inner), channels, inner};
}

// x in the dense layout that at::empty_like gives to the outputs.
inline at::Tensor densified(const at::Tensor& x, const at::Tensor& like) {
  return x.strides() == like.strides() ? x : at::empty_like(like).copy_(x);
}

}  // namespace cctorch::channelwise
