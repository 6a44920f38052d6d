#include "csrc/ops/truncated_svd.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include <map>

#include "csrc/ops/checks.h"

namespace cctorch {

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> truncated_svd(at::TensorList matrices,
                                                                           at::IntArrayRef ranks,
                                                                           at::TensorList bases) {
  using Schema =
      std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>(at::TensorList, at::IntArrayRef, at::TensorList);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::truncated_svd", "").typed<Schema>();
  return op.call(matrices, ranks, bases);
}

namespace {

std::pair<std::vector<c10::SymInt>, std::vector<c10::SymInt>> factor_sizes(const at::Tensor& matrix, int64_t rank) {
  auto left = matrix.sym_sizes().vec(), right = left;
  left.back() = rank;
  right[right.size() - 2] = rank;
  return {left, right};
}

}  // namespace

void check_truncated_svd(at::TensorList matrices, at::IntArrayRef ranks, at::TensorList bases) {
  constexpr auto op = "truncated_svd";
  TORCH_CHECK(ranks.size() == matrices.size(), op, ": expected one rank for each of the ", matrices.size(),
              " matrices, got ", ranks.size());
  TORCH_CHECK(bases.empty() || bases.size() == matrices.size(), op, ": expected no bases or one for each of the ",
              matrices.size(), " matrices, got ", bases.size());
  for (size_t i = 0; i < matrices.size(); ++i) {
    const at::Tensor& matrix = matrices[i];
    const auto name = "matrices[" + std::to_string(i) + "]";
    check_floating(matrix, op, name.c_str());
    check_same_device(matrix, op, name.c_str(), matrices[0], "matrices[0]");
    TORCH_CHECK(matrix.dim() >= 2, op, ": ", name, " must have at least two dimensions, got shape ",
                matrix.sym_sizes());
    const auto rows = matrix.sym_size(-2), columns = matrix.sym_size(-1);
    TORCH_CHECK(ranks[i] >= 1, op, ": ranks[", i, "] must be at least 1, got ", ranks[i]);
    TORCH_SYM_CHECK(rows.sym_ge(ranks[i]).sym_and(columns.sym_ge(ranks[i])), op, ": ranks[", i, "] = ", ranks[i],
                    " is more than a matrix of ", rows, " x ", columns, " can have");
    if (bases.empty() || bases[i].sym_numel() == 0) continue;
    const at::Tensor& basis = bases[i];
    check_same_device(basis, op, ("bases[" + std::to_string(i) + "]").c_str(), matrix, name.c_str());
    const auto [left, right] = factor_sizes(matrix, ranks[i]);
    const auto& smaller = rows <= columns ? left : right;
    TORCH_CHECK(basis.sym_sizes().equals(smaller) && basis.scalar_type() == matrix.scalar_type(), op, ": bases[", i,
                "] must be the factor at the smaller side of ", name, ", ", c10::SymIntArrayRef(smaller), " in ",
                matrix.scalar_type(), ", or empty, got ", basis.sym_sizes(), " in ", basis.scalar_type());
  }
}

std::pair<at::Tensor, at::Tensor> empty_factors(const at::Tensor& matrix, int64_t rank) {
  const auto [left, right] = factor_sizes(matrix, rank);
  return {at::empty_symint(left, matrix.options()), at::empty_symint(right, matrix.options())};
}

namespace {

// On any device; linalg_eigh waits for it, to know whether it converged.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> composite(at::TensorList matrices, at::IntArrayRef ranks,
                                                                       at::TensorList bases) {
  check_truncated_svd(matrices, ranks, bases);
  // Of one size: one decomposition.
  std::map<std::pair<std::vector<int64_t>, int64_t>, std::vector<size_t>> groups;
  for (size_t i = 0; i < matrices.size(); ++i) groups[{matrices[i].sizes().vec(), ranks[i]}].push_back(i);
  std::vector<at::Tensor> left(matrices.size()), right(matrices.size());
  for (const auto& [kind, members] : groups) {
    std::vector<at::Tensor> parts;
    for (const size_t i : members) parts.push_back(matrices[i].to(at::kDouble));
    const at::Tensor all = at::stack(parts);
    const bool wide = all.size(-2) <= all.size(-1);
    const at::Tensor vectors =
        std::get<1>(at::linalg_eigh(wide ? at::matmul(all, all.mT()) : at::matmul(all.mT(), all)));
    const at::Tensor basis = vectors.narrow(-1, vectors.size(-1) - kind.second, kind.second);
    const at::Tensor rest = wide ? at::matmul(basis.mT(), all) : at::matmul(all, basis);
    for (size_t j = 0; j < members.size(); ++j) {
      const auto type = matrices[members[j]].scalar_type();
      const auto factor = [&](const at::Tensor& t) { return t[static_cast<int64_t>(j)].to(type).contiguous(); };
      left[members[j]] = factor(wide ? basis : rest);
      right[members[j]] = factor(wide ? rest : basis.mT());
    }
  }
  return {left, right};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  m.def("truncated_svd(Tensor[] matrices, int[] ranks, Tensor[] bases) -> (Tensor[], Tensor[])",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(cctorch, CompositeExplicitAutograd, m) { m.impl("truncated_svd", &composite); }

}  // namespace cctorch
