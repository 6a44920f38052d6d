#pragma once

#include <ATen/core/Tensor.h>

namespace cctorch::regularize {

// The norm of all elements of a list together: float64, 0-dim, on their device; NaN or infinite if one of them is. The
// same for any number of threads.
at::Tensor total_norm(at::TensorList tensors);

// The same of a - b.
at::Tensor total_distance(at::TensorList a, at::TensorList b);

}  // namespace cctorch::regularize
