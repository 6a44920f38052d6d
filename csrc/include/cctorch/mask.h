#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace cctorch {

// Boolean masks of the weights to keep. Exact: ties go to the lower index, so counts are met to the element.

// The floor((1 - sparsity) * total) largest magnitudes over all weights together are kept.
std::vector<at::Tensor> magnitude_masks(at::TensorList weights, double sparsity);

// The n largest magnitudes of every m consecutive weights along dimension `axis` are kept.
at::Tensor nm_mask(const at::Tensor& weight, int64_t n, int64_t m, int64_t axis = 1);

// The floor((1 - sparsity) * size) slices of dimension `axis` with the largest L2 norm are kept; at least one.
at::Tensor channel_mask(const at::Tensor& weight, double sparsity, int64_t axis = 0);

// y = weight where mask, else 0. Straight-through: the gradient reaches every weight, so a pruned one can come back.
at::Tensor apply_mask(const at::Tensor& weight, const at::Tensor& mask);

}  // namespace cctorch
