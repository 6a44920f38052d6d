#pragma once

#include <cctorch/regularize.h>

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

// Replaces every weight by what `project` makes of its matrix. Equal shapes go in one call: float64, count x rows x
// columns, of weights that are of `type`.
void replace_matrices(std::vector<Weight>& weights, const Unfolding& unfolding,
                      const std::function<at::Tensor(const at::Tensor& matrices, at::ScalarType type)>& project);

// The same with all rows of all matrices of one width below each other.
void replace_rows(std::vector<Weight>& weights, bool per_channel,
                  const std::function<at::Tensor(const at::Tensor& rows, at::ScalarType type)>& project);

int64_t bits_per_element(const at::Tensor& tensor);

}  // namespace cctorch::regularize
