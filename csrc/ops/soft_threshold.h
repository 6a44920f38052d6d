#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/soft_threshold.h>

#include <tuple>

#include "csrc/ops/dispatch.h"

namespace cctorch {

using SoftThresholdOp = at::Tensor(const at::Tensor&, const at::Tensor&, std::optional<int64_t>);
using SoftThresholdListOp = std::vector<at::Tensor>(at::TensorList, at::TensorList, std::optional<int64_t>);

std::tuple<at::Tensor, at::Tensor> soft_threshold_backward(const at::Tensor& grad, const at::Tensor& x,
                                                           const at::Tensor& threshold, std::optional<int64_t> axis);

Lists<2> soft_threshold_list_backward(at::TensorList grad, at::TensorList x, at::TensorList threshold,
                                      std::optional<int64_t> axis);

// Raises where an argument is wrong; returns the axis counted from the front.
std::optional<int64_t> check_soft_threshold(const at::Tensor& x, const at::Tensor& threshold,
                                            std::optional<int64_t> axis);
void check_soft_threshold(at::TensorList x, at::TensorList threshold, std::optional<int64_t> axis);

}  // namespace cctorch
