#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/fake_quant.h>

#include <tuple>

namespace cctorch {

std::tuple<at::Tensor, at::Tensor> fake_quant_backward(const at::Tensor& grad, const at::Tensor& x,
                                                       const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                                                       std::optional<int64_t> axis, double grad_scale);

// Raises where an argument is wrong; returns the axis counted from the front.
std::optional<int64_t> check_fake_quant(const at::Tensor& x, const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                                        std::optional<int64_t> axis);

}  // namespace cctorch
