#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/batch_norm.h>

#include <tuple>

namespace cctorch {

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                   const at::Tensor& weight, const at::Tensor& mean,
                                                                   const at::Tensor& inverse_deviation, double eps);

void check_batch_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);

}  // namespace cctorch
