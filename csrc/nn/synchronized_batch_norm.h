#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/distributed.h>

#include <tuple>

namespace cctorch::nn {

// Normalizes x by the mean and variance that each channel has in the x of all ranks, N x C x H x W; a rank's N may be
// 0. Returns y, and without gradients the mean and the unbiased variance. cctorch/nn/synchronized.py is the same in
// Python.
std::tuple<at::Tensor, at::Tensor, at::Tensor> synchronized_batch_norm(const at::Tensor& x, const at::Tensor& weight,
                                                                       const at::Tensor& bias, double eps,
                                                                       const distributed::Ranks& ranks);

}  // namespace cctorch::nn
