#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/batch_norm.h>

#include <initializer_list>
#include <tuple>
#include <utility>

namespace cctorch {

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                   const at::Tensor& weight, const at::Tensor& mean,
                                                                   const at::Tensor& inverse_deviation, double eps);

// PyTorch's own, on every backend. Statistics are float32 for half precision, whatever its kernel returns.
namespace fallback {

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm(const at::Tensor& x, const at::Tensor& weight,
                                                          const at::Tensor& bias, double eps);

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                   const at::Tensor& weight, const at::Tensor& mean,
                                                                   const at::Tensor& inverse_deviation, double eps);

at::Tensor batch_norm_inference(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                const at::Tensor& mean, const at::Tensor& var, double eps);

}  // namespace fallback

using NamedTensor = std::pair<const char*, const at::Tensor*>;

// Each of `parameters` has an element of x's type for each channel.
void check_batch_norm(const at::Tensor& x, std::initializer_list<NamedTensor> parameters);

// There are no statistics of nothing.
void check_not_empty(const at::Tensor& x);

}  // namespace cctorch
