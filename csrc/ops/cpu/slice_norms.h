#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace cctorch::cpu {

// The sum of squares of every slice along `axis`, in float64: for each tensor as many as its size there.
std::vector<at::Tensor> squared_slice_norms(at::TensorList tensors, int64_t axis);

}  // namespace cctorch::cpu
