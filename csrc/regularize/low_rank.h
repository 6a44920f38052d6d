#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>

#include "csrc/regularize/matrices.h"

namespace cctorch::regularize::low_rank {

// Eigenvectors of the `rank` largest eigenvalues of A A^T, for a batch of A.
at::Tensor leading(const at::Tensor& a, int64_t rank);

// B B^T A
at::Tensor onto(const at::Tensor& basis, const at::Tensor& a);

// The nearest matrices of that rank (Eckart-Young), for a batch in float64.
at::Tensor truncate(const at::Tensor& a, int64_t rank);

void check_ratio(const char* who, const std::optional<double>& ratio);

// Those whose factors have fewer entries than they have become factored; the others are left alone.
void replace_factored(std::vector<Weight>& weights, const Unfolding& unfolding,
                      const std::function<int64_t(const at::Tensor& weight)>& entries,
                      const std::function<at::Tensor(const at::Tensor& matrices, at::ScalarType type)>& project);

}  // namespace cctorch::regularize::low_rank
