#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/collaborative.h>

namespace cctorch::collaborative {

// The matrix whose singular values a layer gives up, as the weight of a layer that has its rows as outputs: N x C x ...
// as it is for the layout channel, (N kh) x C x 1 x kw for spatial. Columns are channel by channel in both.
at::Tensor as_matrix(const at::Tensor& weight, const LayerSpec& spec, const Options& options);

// The layer of that weight; it has as many multiply-accumulates, whole and in two factors, where padding keeps the
// height: the first of two kernels is counted at the positions of the output.
LayerSpec as_matrix(const LayerSpec& spec, const Options& options);

}  // namespace cctorch::collaborative
