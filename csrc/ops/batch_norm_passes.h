#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

// The passes over x that batch normalization and its backward are made of, for those who do something in between:
// statistics of several ranks. x and grad are N x C x H x W of one floating type; what is per channel is float64, C.
namespace cctorch {

// Mean and biased variance. x must not be empty.
std::tuple<at::Tensor, at::Tensor> batch_norm_moments(const at::Tensor& x);

// (x - mean) scale + constant
at::Tensor batch_norm_affine(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& scale,
                             const at::Tensor& constant);

// The sums of grad and of grad (x - mean).
std::tuple<at::Tensor, at::Tensor> batch_norm_grad_sums(const at::Tensor& grad, const at::Tensor& x,
                                                        const at::Tensor& mean);

// (grad - constant) scale - (x - mean) slope
at::Tensor batch_norm_grad_input(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean,
                                 const at::Tensor& constant, const at::Tensor& scale, const at::Tensor& slope);

// The same, of ATen's operators.
namespace fallback {

decltype(cctorch::batch_norm_moments) batch_norm_moments;
decltype(cctorch::batch_norm_affine) batch_norm_affine;
decltype(cctorch::batch_norm_grad_sums) batch_norm_grad_sums;
decltype(cctorch::batch_norm_grad_input) batch_norm_grad_input;

}  // namespace fallback

// x is N x C x H x W of a floating type; each of `per_channel` is float64, C.
void check_batch_norm_pass(const char* op, const at::Tensor& x, at::TensorList per_channel);

}  // namespace cctorch
