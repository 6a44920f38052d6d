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

decltype(cctorch::batch_norm) batch_norm;
decltype(cctorch::batch_norm_backward) batch_norm_backward;
decltype(cctorch::batch_norm_inference) batch_norm_inference;

}  // namespace fallback

using NamedTensor = std::pair<const char*, const at::Tensor*>;

// Each of `parameters` has an element of x's type for each channel.
void check_batch_norm(const at::Tensor& x, std::initializer_list<NamedTensor> parameters);

// There are no statistics of nothing.
void check_not_empty(const at::Tensor& x);

}  // namespace cctorch
