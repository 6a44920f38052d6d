#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace cctorch {

// y = (x first^T) second^T + bias, first: rank x C, second: N x rank. Multiplies the factors out first where that is
// cheaper for the given number of rows.
at::Tensor low_rank_linear(const at::Tensor& x, const at::Tensor& first, const at::Tensor& second,
                           const std::optional<at::Tensor>& bias = std::nullopt);

// A convolution with `first` (rank x C x kh x kw; stride, padding and dilation apply here) and then a 1 x 1 convolution
// with `second` (N x rank x 1 x 1) and the bias.
at::Tensor low_rank_conv2d(const at::Tensor& x, const at::Tensor& first, const at::Tensor& second,
                           const std::optional<at::Tensor>& bias = std::nullopt, at::IntArrayRef stride = {1, 1},
                           at::IntArrayRef padding = {0, 0}, at::IntArrayRef dilation = {1, 1});

}  // namespace cctorch
