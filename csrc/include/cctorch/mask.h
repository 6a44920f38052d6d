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

// The weights where magnitude_masks() keeps them, else 0, in the same time as the masks. Straight-through: the gradient
// reaches every weight.
std::vector<at::Tensor> magnitude_prune(at::TensorList weights, double sparsity);

// The n largest magnitudes of every m consecutive weights along dimension `axis` are kept; its size must be a
// multiple of m.
std::vector<at::Tensor> nm_masks(at::TensorList weights, int64_t n, int64_t m, int64_t axis = 1);

// Slices along dimension `axis` are ranked over all weights together by the root of their mean square, which in one
// weight is the order of their L2 norms. The best floor((1 - sparsity) * slices) are kept, of each weight one at least.
std::vector<at::Tensor> channel_masks(at::TensorList weights, double sparsity, int64_t axis = 0);

// Each weight is a matrix, its first dimension by all others, cut into blocks of rows x columns, which must divide it.
// The floor((1 - sparsity) * blocks) with the largest L2 norm over all weights together are kept.
std::vector<at::Tensor> block_masks(at::TensorList weights, double sparsity, int64_t rows, int64_t columns);

// y = weight where mask, else 0. Straight-through: the gradient reaches every weight, so a pruned one can come back.
at::Tensor apply_mask(const at::Tensor& weight, const at::Tensor& mask);

}  // namespace cctorch
