#include "csrc/regularize/low_rank.h"

#include <ATen/ATen.h>
#include <cctorch/regularize.h>

#include <algorithm>
#include <cmath>

namespace cctorch::regularize {

namespace low_rank {

at::Tensor leading(const at::Tensor& a, int64_t rank) {
  const at::Tensor vectors = std::get<1>(at::linalg_eigh(at::matmul(a, a.transpose(-1, -2))));
  return vectors.narrow(-1, vectors.size(-1) - rank, rank);
}

at::Tensor onto(const at::Tensor& basis, const at::Tensor& a) {
  return at::matmul(basis, at::matmul(basis.transpose(-1, -2), a));
}

// By the Gram matrix of the smaller side. In float64 the squared condition number costs nothing that a float32 weight
// could show.
at::Tensor truncate(const at::Tensor& a, int64_t rank) {
  if (a.size(-2) > a.size(-1)) return truncate(a.transpose(-1, -2), rank).transpose(-1, -2);
  return rank < a.size(-2) ? onto(leading(a, rank), a) : a;
}

void check_ratio(const char* who, const std::optional<double>& ratio) {
  TORCH_CHECK_VALUE(!ratio || (*ratio > 1 && std::isfinite(*ratio)), who, ": ratio = ", ratio.value_or(0),
                    ", expected a finite number above 1: weights for each entry of the factors");
}

void replace_factored(std::vector<Weight>& weights, const Unfolding& unfolding,
                      const std::function<int64_t(const at::Tensor& weight)>& entries,
                      const std::function<at::Tensor(const at::Tensor&, at::ScalarType)>& project) {
  std::vector<Weight> factored;
  std::vector<size_t> positions;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t values = entries(weights[i].value);
    if (values >= weights[i].value.numel()) continue;
    positions.push_back(i);
    factored.push_back(weights[i]);
    factored.back().storage = Storage::dense(weights[i].value);
    factored.back().storage.values = values;
    factored.back().storage.factored = true;
  }
  replace_matrices(factored, unfolding, project);
  for (size_t j = 0; j < positions.size(); ++j) weights[positions[j]] = std::move(factored[j]);
}

}  // namespace low_rank

namespace {

int64_t rank_of(const RankOrRatio& size, int64_t rows, int64_t columns) {
  if (size.rank) return *size.rank;
  TORCH_INTERNAL_ASSERT(size.ratio.has_value());
  const double entries = static_cast<double>(rows * columns) / *size.ratio;
  return std::max<int64_t>(1, static_cast<int64_t>(entries / static_cast<double>(rows + columns)));
}

}  // namespace

SVD::SVD(RankOrRatio size, MatrixView view) : size_(size), view_(view) {
  TORCH_CHECK_VALUE(size.rank.has_value() != size.ratio.has_value(), "SVD: expected either a rank or a ratio, got ",
                    size.rank ? "both" : "neither");
  TORCH_CHECK_VALUE(size.rank.value_or(1) >= 1, "SVD: rank = ", size.rank.value_or(1), ", expected at least 1");
  low_rank::check_ratio("SVD", size.ratio);
}

void SVD::replace(std::vector<Weight>& weights) {
  const auto entries = [&](const at::Tensor& weight) {
    const int64_t rows = weight.size(0) * (view_ == MatrixView::spatial && weight.dim() == 4 ? weight.size(2) : 1);
    const int64_t columns = weight.numel() / rows;
    return rank_of(size_, rows, columns) * (rows + columns);
  };
  low_rank::replace_factored(weights, as_matrix(view_), entries, [&](const at::Tensor& matrices, at::ScalarType) {
    return low_rank::truncate(matrices, rank_of(size_, matrices.size(-2), matrices.size(-1)));
  });
}

}  // namespace cctorch::regularize
