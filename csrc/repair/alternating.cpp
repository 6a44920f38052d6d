#include "csrc/repair/alternating.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

namespace cctorch::repair {

namespace {

// Where a sweep gains less than this part of the error, or after so many, it ends.
constexpr double kLeastGain = 1e-3;
constexpr int kMostSweeps = 10;
constexpr int kGradientSteps = 2;

double inner_product(const at::Tensor& a, const at::Tensor& b) { return a.mul(b).sum().item<double>(); }

// The factor of a matrix that rounding may have made slightly indefinite: what is added to its diagonal grows until it
// is not.
at::Tensor cholesky_factor(const at::Tensor& matrix) {
  double added = 0;
  while (true) {
    at::Tensor definite = matrix;
    if (added > 0) {
      definite = matrix.clone();
      definite.diagonal().add_(added);
    }
    const auto [lower, failed] = at::linalg_cholesky_ex(definite);
    if (failed.item<int>() == 0) return lower;
    const auto mean = matrix.diagonal().mean().item<double>();
    TORCH_CHECK_VALUE(std::isfinite(mean), "repair: the metric of the inputs holds NaN or infinite values");
    added = std::max({10 * added, 1e-14 * mean, std::numeric_limits<double>::min()});
  }
}

// With unknowns in the order (i, q), q = (c, j), an outer factor N x (i, r) and an inner one r x q: the weight, as
// (N i) x q, is their product.
class Alternation {
 public:
  Alternation(const at::Tensor& best, const at::Tensor& metric, int64_t channels, int64_t columns, int64_t rank)
      : outputs_(best.size(0)),
        inputs_(best.size(1)),
        channels_(channels),
        columns_(columns),
        rows_(inputs_ / (channels * columns)),
        rank_(rank),
        metric_(reordered(reordered(metric).t()).contiguous()) {
    const at::Tensor weight = reordered(best);
    wanted_ = at::mm(weight, metric_);
    total_ = inner_product(wanted_, weight);
    const at::Tensor blocks = metric_.view({rows_, width(), rows_, width()}).diagonal(0, 0, 2);
    preconditioner_ = cholesky_factor(blocks.mean(-1));
  }

  at::Tensor run(const at::Tensor& start) const {
    at::Tensor inner = orthonormal(start.flatten(1));
    auto [outer, explained] = best_outer(inner);
    for (int sweep = 0; sweep < kMostSweeps; ++sweep) {
      const at::Tensor next_inner = orthonormal(improved_inner(outer, inner));
      const auto [next_outer, next_explained] = best_outer(next_inner);
      // Rounding can undo the last of the gains.
      if (!(next_explained > explained)) break;
      const bool is_last = next_explained - explained <= kLeastGain * (total_ - explained);
      inner = next_inner;
      outer = next_outer;
      explained = next_explained;
      if (is_last) break;
    }
    return unordered(product(outer, inner));
  }

 private:
  int64_t width() const { return channels_ * columns_; }

  // Columns from (c, i, j) to (i, c, j), and back.
  at::Tensor reordered(const at::Tensor& weight) const {
    return weight.reshape({-1, channels_, rows_, columns_}).transpose(1, 2).reshape({-1, inputs_});
  }
  at::Tensor unordered(const at::Tensor& weight) const {
    return weight.reshape({-1, rows_, channels_, columns_}).transpose(1, 2).reshape({-1, inputs_});
  }

  // The same weights, and a well conditioned problem for the other factor.
  static at::Tensor orthonormal(const at::Tensor& inner) {
    return std::get<0>(at::linalg_qr(inner.t())).t().contiguous();
  }

  at::Tensor product(const at::Tensor& outer, const at::Tensor& inner) const {
    return at::mm(outer.view({-1, inner.size(0)}), inner).view({outputs_, inputs_});
  }

  // By reduced-rank regression on what the inner factor makes of the inputs; and |W'|^2, which |best|^2 exceeds by the
  // error |W' - best|^2.
  std::tuple<at::Tensor, double> best_outer(const at::Tensor& inner) const {
    const int64_t unknowns = rows_ * inner.size(0);
    const at::Tensor half = at::matmul(metric_.view({inputs_ * rows_, width()}), inner.t());
    const at::Tensor seen = at::matmul(inner, half.view({rows_, width(), unknowns})).view({unknowns, unknowns});
    const at::Tensor wanted = at::mm(wanted_.view({-1, width()}), inner.t()).view({outputs_, unknowns});
    const at::Tensor lower = cholesky_factor(seen);
    const at::Tensor outer = truncate(at::cholesky_solve(wanted.t(), lower).t(), lower, rank_).contiguous();
    return {outer, at::mm(outer, lower).square_().sum().item<double>()};
  }

  // Some steps of conjugate gradients, preconditioned as if the metric were the same for all i and nothing between
  // them.
  at::Tensor improved_inner(const at::Tensor& outer, const at::Tensor& inner) const {
    const at::Tensor matrix = outer.view({-1, inner.size(0)});
    at::Tensor gram = at::mm(matrix.t(), matrix);
    gram.diagonal().add_(1e-6 * gram.diagonal().mean().item<double>());
    const at::Tensor lower = cholesky_factor(gram);
    const auto gradient = [&](const at::Tensor& weight) { return at::mm(matrix.t(), weight.view({-1, width()})); };
    const auto preconditioned = [&](const at::Tensor& residual) {
      return at::cholesky_solve(at::cholesky_solve(residual, lower).t(), preconditioner_).t();
    };
    const auto applied = [&](const at::Tensor& change) { return gradient(at::mm(product(outer, change), metric_)); };
    at::Tensor found = inner, residual = gradient(wanted_) - applied(inner);
    at::Tensor direction = preconditioned(residual);
    double size = inner_product(residual, direction);
    for (int step = 0; step < kGradientSteps && size > 0; ++step) {
      const at::Tensor image = applied(direction);
      const double length = size / inner_product(direction, image);
      found = found + length * direction;
      residual = residual - length * image;
      const at::Tensor next = preconditioned(residual);
      const double next_size = inner_product(residual, next);
      direction = next + next_size / size * direction;
      size = next_size;
    }
    return found;
  }

  int64_t outputs_, inputs_, channels_, columns_, rows_, rank_;
  at::Tensor metric_;          // (i q) x (i q)
  at::Tensor wanted_;          // best metric, N x (i q)
  double total_ = 0;           // |best|^2
  at::Tensor preconditioner_;  // Cholesky factor of the mean over i of the metric, q x q
};

}  // namespace

at::Tensor alternate(const at::Tensor& best, const at::Tensor& metric, const at::Tensor& inner, int64_t rank) {
  return Alternation(best, metric, inner.size(1), inner.size(2), rank).run(inner);
}

at::Tensor truncate(const at::Tensor& best, const at::Tensor& lower, int64_t rank) {
  if (rank >= std::min(best.size(0), best.size(1))) return best;
  // |W' - W|^2 in the metric of the inputs is |(W' - W) L|^2, so the best W' of a rank is a truncation of W L.
  const at::Tensor seen = at::mm(best, lower);
  const at::Tensor basis = std::get<1>(at::linalg_eigh(at::mm(seen, seen.t()))).narrow(1, best.size(0) - rank, rank);
  return at::mm(basis, at::mm(basis.t(), best));
}

}  // namespace cctorch::repair
