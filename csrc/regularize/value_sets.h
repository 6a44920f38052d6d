#pragma once

#include <cctorch/regularizers.h>

namespace cctorch::regularize {

// Rows in float64, of weights of a type, on the values that BinaryCodeQuantization and CodebookQuantization choose.
// Composed of ATen operators, for any device; csrc/ops/cpu/row_fit.h is the same for the CPU.
at::Tensor as_binary_code(const at::Tensor& rows, int64_t bits, at::ScalarType type);
at::Tensor on_codebook(const at::Tensor& rows, int64_t count);

}  // namespace cctorch::regularize
