#pragma once

#include <cctorch/regularizers.h>

namespace cctorch::regularize {

// Q(w), of which some may be left to do; no parameter has changed.
struct Prepared {
  NamedParameters parameters;
  std::vector<Weight> weights;  // of each
  at::Tensor weight_norm;       // ||w||: float64, 0-dim, on the parameters' device
  int64_t bits = 0;
  int64_t dense_bits = 0;

  std::vector<at::Tensor> values() const;
};

// Throws as Regularizer::project does. What is left to do is left in weights whose value is the parameter's memory.
Prepared prepare(Regularizer& regularizer, const NamedParameters& parameters);

// ||Q(w) - w|| of the weights of which nothing is left to do: float64, 0-dim, on the parameters' device (on the CPU
// where there are none).
at::Tensor update_norm(const Prepared& prepared);

// w <- Q(w), all of it. Returns the norm of what was left to do.
double write(const Prepared& prepared);

// Throws c10::ValueError naming the first of `tensors` that is NaN or infinite, if `norm` is not finite.
void check_finite(double norm, const char* what, const NamedParameters& parameters, at::TensorList tensors);

}  // namespace cctorch::regularize
