#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/soft_threshold.h>

#include <tuple>

namespace cctorch {

std::tuple<at::Tensor, at::Tensor> soft_threshold_backward(const at::Tensor& grad, const at::Tensor& x,
                                                           const at::Tensor& threshold, std::optional<int64_t> axis);

// Raises where an argument is wrong; returns the axis counted from the front.
std::optional<int64_t> check_soft_threshold(const at::Tensor& x, const at::Tensor& threshold,
                                            std::optional<int64_t> axis);

}  // namespace cctorch
