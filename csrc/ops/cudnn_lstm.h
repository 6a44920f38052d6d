#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace cctorch {

// A layer of low_rank_lstm, its arguments checked, by cuDNN's kernels, which go through all steps in one call and know
// whole matrices only: of each weight's factors the product, but of weight_ih's the first are x's own product.
// Nothing, where cuDNN can't do it or the steps are needed one by one: on other devices and types, under torch.func,
// forward-mode differentiation and tracing, and with torch.backends.cudnn.enabled off. Second derivatives need that.
std::optional<std::tuple<at::Tensor, at::Tensor, at::Tensor>> cudnn_lstm(
    const at::Tensor& x, const at::Tensor& h, const at::Tensor& c, at::TensorList weight_ih, at::TensorList weight_hh,
    at::TensorList weight_hr, const std::optional<at::Tensor>& bias_ih, const std::optional<at::Tensor>& bias_hh,
    const std::vector<int64_t>& batch_sizes, bool reverse);

}  // namespace cctorch
