#pragma once

#include <cctorch/regularizers.h>

#include <functional>

namespace cctorch::regularize {

// How a weight is seen as a matrix (or, for Tucker-2, as a three-dimensional tensor), and back.
struct Unfolding {
  std::function<at::Tensor(const at::Tensor& weight)> to_matrix;
  std::function<at::Tensor(const at::Tensor& matrix, at::IntArrayRef sizes)> to_weight;
};

// One row for each slice of dimension 0, or a single row.
Unfolding as_rows(bool per_channel);

Unfolding as_matrix(MatrixView view);

// Replaces every weight by what `project` makes of its rows. Rows of one width and type, below each other, go in one
// call: float64, of weights that are of `type`.
void replace_rows(std::vector<Weight>& weights, bool per_channel,
                  const std::function<at::Tensor(const at::Tensor& rows, at::ScalarType type)>& project);

int64_t bits_per_element(const at::Tensor& tensor);

}  // namespace cctorch::regularize
