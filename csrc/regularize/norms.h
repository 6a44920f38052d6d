#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace cctorch::regularize {

// Itself where no element lies between or over its own, else a copy.
at::Tensor dense(const at::Tensor& tensor);

// Sums of squares of the parts of each of a list of tensors on CPU: of its slices along `dimension`, or of pieces of
// its memory. NaN or infinite if an element is; the same for any number of threads.
std::vector<std::vector<double>> part_squares(at::TensorList tensors, std::optional<int64_t> dimension = std::nullopt);

// The norm of all elements of a list together: float64, 0-dim, on their device; NaN or infinite if one of them is.
at::Tensor total_norm(const std::vector<std::vector<double>>& squares);
at::Tensor total_norm_on_device(at::TensorList tensors);

// The same of a - b.
at::Tensor total_distance(at::TensorList a, at::TensorList b);

// ||a - b||^2 of n numbers in memory, on this thread.
double squared_distance(at::ScalarType type, const void* a, const void* b, int64_t n);

}  // namespace cctorch::regularize
