#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/low_rank.h>

namespace cctorch {

void check_truncated_svd(at::TensorList matrices, at::IntArrayRef ranks, at::TensorList bases);

// rows x rank and rank x columns, in the dimensions of a batch of matrices.
std::pair<at::Tensor, at::Tensor> empty_factors(const at::Tensor& matrix, int64_t rank);

// Whether a basis makes any difference: not where the exact way is the cheap one.
bool starts_from_bases(const at::Tensor& matrix);

}  // namespace cctorch
