#pragma once

#include <ATen/core/Tensor.h>

#include "csrc/ops/sorted_rows.h"

// The values that each row of float64 is best quantized to, for the operators and for the regularizers. Composed of
// ATen operators; on CPU csrc/ops/cpu/row_fit.h, row by row.
namespace cctorch {

// `magnitudes` with the signs of `rows`; 0 counts as positive.
at::Tensor with_sign_of(const at::Tensor& magnitudes, const at::Tensor& rows);

// The a of the best -a, 0, a: rows x 1.
at::Tensor ternary_reach(const at::Tensor& rows);

// Sums of scaled binary codes: each code from what the ones before leave, or the best that alternating least squares
// finds; that is the optimum for 1 and 2 bits.
namespace composed {
at::Tensor ternary_reach(const at::Tensor& rows);
at::Tensor greedy_code(const at::Tensor& rows, int64_t bits);
at::Tensor fitted_code(const at::Tensor& rows, int64_t bits);
}  // namespace composed

// One step of Lloyd's algorithm for ascending centers; the center of an empty cell stays: it may be reached later.
at::Tensor kmeans_step(const SortedRows& sorted, const at::Tensor& centers);

}  // namespace cctorch
