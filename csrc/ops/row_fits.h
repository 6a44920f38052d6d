#pragma once

#include <ATen/core/Tensor.h>

#include "csrc/ops/sorted_rows.h"

// Searches for the values of each row, of many small steps: a kernel on CUDA, elsewhere composed of ATen operators. All
// is float64.
namespace cctorch {

// The largest level of the grid of 2 q + 1 levels for each row: of least squared error from 31 starts. rows x 1.
at::Tensor searched_reach(const at::Tensor& rows, double q);

// `centers`, rows x starts x values and ascending, after 50 iterations of Lloyd's algorithm.
at::Tensor lloyd(const SortedRows& sorted, const at::Tensor& centers);

// `scales`, rows x bits, of binary codes after 20 turns of nearest levels and least squares.
at::Tensor alternated(const SortedRows& sorted, const at::Tensor& scales);

// All codes of so many bits: 2^bits x bits, of -1 and 1.
at::Tensor all_codes(int64_t bits, const at::TensorOptions& options);

namespace row_fits {
constexpr int kClips = 30;
constexpr double kClipRatio = 0.9;
constexpr int kRefinements = 10;
constexpr int kIterations = 50;
constexpr int kTurns = 20;
}  // namespace row_fits

namespace composed {
at::Tensor searched_reach(const at::Tensor& rows, double q);
at::Tensor lloyd(const at::Tensor& values, const at::Tensor& sums, const at::Tensor& centers);
at::Tensor alternated(const at::Tensor& values, const at::Tensor& sums, const at::Tensor& scales);
}  // namespace composed

}  // namespace cctorch
