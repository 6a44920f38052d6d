#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace cctorch::repair {

// The W' of rank at most `rank` with the smallest |W' - best|^2 in the metric lower lower^T of the inputs.
at::Tensor truncate(const at::Tensor& best, const at::Tensor& lower, int64_t rank);

// A W'[n, (c, i, j)] = sum_r outer[n, r, i] inner[r, c, j] that is close to `best`, N x P, in the metric of the inputs,
// P x P; outer, as N x (r i), of rank at most `rank`. Starts from `inner`, r x C x J: with the best outer factor for
// it. Nothing that it does makes |W' - best|^2 larger.
at::Tensor alternate(const at::Tensor& best, const at::Tensor& metric, const at::Tensor& inner, int64_t rank);

}  // namespace cctorch::repair
