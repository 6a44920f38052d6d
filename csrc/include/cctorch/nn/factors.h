#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/plan.h>

#include <cstdint>

namespace cctorch::nn {

// What takes the place of a layer's weight where the plan has a rank. `core` is undefined but for the layout tucker.
struct Factors {
  at::Tensor first, core, second;
};

// Of `weight`, the dense layer's, restricted to what the plan keeps: in its type and memory format.
Factors factorize(const at::Tensor& weight, const LayerPlan& plan);

// With arbitrary values: of a layer of `in` inputs and `out` outputs, whose weight has `kernel` as further dimensions.
Factors empty_factors(const LayerPlan& plan, int64_t out, int64_t in, at::IntArrayRef kernel);

// Throws c10::ValueError where the weight that `plan` would factor, restricted to the kept inputs, has no such ranks.
void check_rank(const LayerPlan& plan, at::IntArrayRef kernel);

}  // namespace cctorch::nn
