#pragma once

#include <cctorch/regularizers.h>

namespace cctorch::regularize {

// Rows in float64, of weights of a type, on the grids of 2 q + 1 levels that UniformQuantization chooses. Composed of
// ATen operators, for any device; csrc/ops/cpu/simd/uniform_grid.h is the same for the CPU.
at::Tensor on_uniform_grid(const at::Tensor& rows, at::ScalarType type, double q, Range range);

}  // namespace cctorch::regularize
