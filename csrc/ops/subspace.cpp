#include "csrc/ops/subspace.h"

#include <ATen/ATen.h>

#include <limits>

namespace cctorch::composed {

at::Tensor leading(const at::Tensor& a, int64_t rank) {
  const at::Tensor vectors = std::get<1>(at::linalg_eigh(at::matmul(a, a.mT())));
  return vectors.narrow(-1, vectors.size(-1) - rank, rank).mT();
}

at::Tensor orthonormal(const at::Tensor& rows) {
  const at::Tensor unit = rows / at::linalg_vector_norm(rows, 2, {-1}, /*keepdim=*/true).clamp_min(1e-150);
  at::Tensor products = at::matmul(unit, unit.mT());
  // The shift makes the first pass safe; the second one removes what it leaves of the angles.
  products.diagonal(0, -2, -1).add_(1e-14 * static_cast<double>(rows.size(-2)));
  const at::Tensor first = std::get<0>(at::linalg_cholesky_ex(products));
  const at::Tensor near = at::linalg_solve_triangular(first, unit, /*upper=*/false);
  const auto [second, failed] = at::linalg_cholesky_ex(at::matmul(near, near.mT()));
  // What the shift left so short is made of rounding.
  const at::Tensor dependent = failed.ne(0).logical_or_(second.diagonal(0, -2, -1).amin(-1).lt(0.03));
  return at::linalg_solve_triangular(second, near, /*upper=*/false)
      .masked_fill_(dependent.view({-1, 1, 1}), std::numeric_limits<double>::quiet_NaN());
}

at::Tensor turned_towards(const at::Tensor& a, const at::Tensor& basis) {
  return orthonormal(at::matmul(at::matmul(basis, a), a.mT()));
}

at::Tensor near(const at::Tensor& before, const at::Tensor& after) {
  // Of a basis of the whole space only rounding is left.
  constexpr double rounding = 1e-9;
  const auto rank = static_cast<double>(after.size(-2)), rest = static_cast<double>(after.size(-1)) - rank;
  const at::Tensor overlap = at::matmul(after, before.mT()).square_().sum({-2, -1});
  return overlap >= rank - 0.002 * rest / 3 - rounding;
}

std::vector<std::vector<int64_t>> far_ones(const std::vector<at::Tensor>& near) {
  std::vector<std::vector<int64_t>> far(near.size());
  if (near.empty()) return far;
  const at::Tensor all = at::cat(near).cpu();
  const bool* flag = all.const_data_ptr<bool>();
  for (size_t i = 0; i < near.size(); ++i) {
    for (int64_t j = 0; j < near[i].numel(); ++j) {
      if (!*flag++) far[i].push_back(j);
    }
  }
  return far;
}

std::vector<at::Tensor> apart(const at::Tensor& batch, at::ScalarType type) {
  const auto parts = batch.to(type).contiguous().unbind();
  std::vector<at::Tensor> copies;
  for (const at::Tensor& part : parts) copies.push_back(at::empty_like(part));
  at::_foreach_copy_(copies, parts);
  return copies;
}

}  // namespace cctorch::composed
