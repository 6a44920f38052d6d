#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace cctorch {

// Batch normalization by the batch's own statistics (Ioffe & Szegedy 2015), for training:
//
//     y = (x - mean) / sqrt(var + eps) weight + bias,
//
// with the mean and the biased variance of each channel (dimension 1) over all others. Returns y, mean and
// 1 / sqrt(var + eps). x is N x C x H x W, weight and bias have C elements of x's type.
//
// PyTorch's CPU kernel for channels_last takes several times longer where the channels don't fill vectors, as after
// channel pruning. This one does not. Elsewhere (other layouts, devices and types) PyTorch's own is used.
std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm(const at::Tensor& x, const at::Tensor& weight,
                                                          const at::Tensor& bias, double eps);

// The same by given statistics, for evaluation: y = (x - mean) / sqrt(var + eps) weight + bias.
at::Tensor batch_norm_inference(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                const at::Tensor& mean, const at::Tensor& var, double eps);

}  // namespace cctorch
