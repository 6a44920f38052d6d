#include "csrc/ops/truncated_svd.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

#include "csrc/largest_first.h"
#include "csrc/ops/cpu/subspace.h"

namespace cctorch {

bool starts_from_bases(const at::Tensor& matrix) {
  return matrix.scalar_type() != at::kDouble &&
         (!matrix.is_cpu() || std::min(matrix.size(-2), matrix.size(-1)) > cpu::subspace::direct_rows);
}

}  // namespace cctorch

namespace cctorch::cpu {
namespace {

// A matrix, or as many of a batch of small ones as make one piece of work.
struct Piece {
  at::Tensor matrices, basis, left, right;  // batch x ...; no more rows than columns
  double cost() const {
    const auto rows = static_cast<double>(matrices.size(1));
    return static_cast<double>(matrices.numel()) * rows +
           10 * static_cast<double>(matrices.size(0)) * rows * rows * rows;
  }
};

bool is_exact(const at::Tensor& matrices) {
  return matrices.scalar_type() == at::kDouble || matrices.size(-2) <= subspace::exact_rows;
}

void factor_exactly(const Piece& piece) {
  const at::Tensor matrices = piece.matrices.to(at::kDouble);
  // What the matrices are rounded from decides how they are decomposed: float64 may ask for more than float32.
  const at::Tensor basis = subspace::exact_basis(piece.matrices, piece.left.size(2));
  piece.left.copy_(basis.mT());
  piece.right.copy_(at::matmul(basis, matrices));
}

void factor(const Piece& piece) {
  const bool started = piece.basis.defined() && starts_from_bases(piece.matrices);
  if (started) {
    const auto factors = subspace::warm(piece.matrices[0].to(at::kFloat), piece.basis[0].to(at::kFloat));
    if (factors) {
      piece.left[0].copy_(factors->first);
      piece.right[0].copy_(factors->second);
      return;
    }
  }
  if (is_exact(piece.matrices)) {
    factor_exactly(piece);
    return;
  }
  const at::Tensor matrix = piece.matrices[0].to(at::kFloat);
  const at::Tensor basis = subspace::leading(matrix, piece.left.size(2));
  piece.left[0].copy_(basis.t());
  at::Tensor right = piece.right[0];
  if (right.scalar_type() == at::kFloat) {
    at::mm_out(right, basis, matrix);
  } else {
    right.copy_(at::mm(basis, matrix));
  }
}

void cut(std::vector<Piece>& pieces, const at::Tensor& matrices, const at::Tensor& basis, const at::Tensor& left,
         const at::Tensor& right) {
  const int64_t rows = matrices.size(-2), columns = matrices.size(-1);
  if (rows > columns) {
    cut(pieces, matrices.mT(), basis.defined() ? basis.mT() : basis, right.mT(), left.mT());
    return;
  }
  const auto batch = [](const at::Tensor& t) { return t.dim() == 2 ? t.unsqueeze(0) : t.flatten(0, -3); };
  const Piece whole{batch(matrices), basis.defined() ? batch(basis) : basis, batch(left), batch(right)};
  const int64_t count = whole.matrices.size(0);
  const bool alone = !is_exact(matrices) || (basis.defined() && starts_from_bases(matrices));
  const int64_t some = alone ? 1 : std::max<int64_t>(1, (1 << 18) / (rows * columns));
  for (int64_t begin = 0; begin < count; begin += some) {
    const auto part = [&](const at::Tensor& t) {
      return t.defined() ? t.narrow(0, begin, std::min(some, count - begin)) : t;
    };
    pieces.push_back({part(whole.matrices), part(whole.basis), part(whole.left), part(whole.right)});
  }
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> truncated_svd(at::TensorList matrices,
                                                                           at::IntArrayRef ranks,
                                                                           at::TensorList bases) {
  check_truncated_svd(matrices, ranks, bases);
  std::vector<at::Tensor> left, right;
  std::vector<Piece> pieces;
  for (size_t i = 0; i < matrices.size(); ++i) {
    auto factors = empty_factors(matrices[i], ranks[i]);
    left.push_back(std::move(factors.first));
    right.push_back(std::move(factors.second));
    const bool started = !bases.empty() && bases[i].numel() > 0;
    if (left[i].numel() > 0 && right[i].numel() > 0) {
      cut(pieces, matrices[i], started ? bases[i] : at::Tensor(), left[i], right[i]);
    }
  }
  std::vector<double> costs;
  for (const Piece& piece : pieces) costs.push_back(piece.cost());
  largest_first(costs, [&](size_t i) { factor(pieces[i]); });
  return {left, right};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) { m.impl("truncated_svd", &truncated_svd); }

}  // namespace cctorch::cpu
