#pragma once

#include <cctorch/regularize.h>

namespace cctorch::regularize {

// ||Q(w) - w||: float64, 0-dim, on the parameters' device (on the CPU where there are none).
at::Tensor update_norm(const Projection& projection);

// w <- Q(w)
void write(const Projection& projection);

// Throws c10::ValueError naming the first of `tensors` that is NaN or infinite, if `norm` is not finite.
void check_finite(double norm, const char* what, const NamedParameters& parameters, at::TensorList tensors);

}  // namespace cctorch::regularize
