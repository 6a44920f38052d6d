#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace cctorch {

// Boolean masks of the weights to keep, each of its weight's shape and layout. Exact: ties go to the lower (row-major)
// index, so counts are met to the element. NaN is an error on CPU; elsewhere, without waiting for the device to look,
// it counts as the largest.

// The floor((1 - sparsity) * total) largest magnitudes over all weights together are kept, counted for the decimal
// fraction written: 0.9 of 10 weights leaves 1.
std::vector<at::Tensor> magnitude_masks(at::TensorList weights, double sparsity);

// The n largest magnitudes of every m consecutive weights along dimension `axis` are kept; its size must be a
// multiple of m.
at::Tensor nm_mask(const at::Tensor& weight, int64_t n, int64_t m, int64_t axis = 1);

// The floor((1 - sparsity) * size) slices of dimension `axis` with the largest L2 norm are kept; at least one.
at::Tensor channel_mask(const at::Tensor& weight, double sparsity, int64_t axis = 0);

// y = weight where mask, else 0. Straight-through: the gradient reaches every weight, so a pruned one can come back.
at::Tensor apply_mask(const at::Tensor& weight, const at::Tensor& mask);

}  // namespace cctorch
