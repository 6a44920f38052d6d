#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace cctorch::regularize {

// Of each of several weights of one shape, count x ..., the `kept` slices along dimension `axis` of a weight (counted
// from the front) with the largest L2 norm, the first of several as large; else 0. What channel_masks keeps of each
// alone, in a few operators for all of them.
at::Tensor keep_best_slices(const at::Tensor& weights, int64_t axis, int64_t kept);

}  // namespace cctorch::regularize
