#include "csrc/ops/truncated_svd.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#include <map>

#include "csrc/ops/checks.h"
#include "csrc/ops/subspace.h"

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

// Matrices of one size, rank and type, count x rows x columns with rows <= columns: one decomposition.
struct Group {
  std::vector<size_t> members;
  at::Tensor all, basis, near;
};

// Two steps from the bases of an earlier call.
void start(Group& group, const at::Tensor& bases) {
  const at::Tensor once = composed::turned_towards(group.all, composed::orthonormal(bases.to(at::kDouble)));
  group.basis = composed::turned_towards(group.all, once);
  group.near = composed::near(once, group.basis);
}

// On any device. The host waits for it once to see which of the bases were near enough, and to decompose the others.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> composite(at::TensorList matrices, at::IntArrayRef ranks,
                                                                       at::TensorList bases) {
  check_truncated_svd(matrices, ranks, bases);
  using Kind = std::tuple<std::vector<int64_t>, int64_t, at::ScalarType, bool>;
  std::map<Kind, Group> groups;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const bool started = !bases.empty() && bases[i].numel() > 0 && starts_from_bases(matrices[i]);
    groups[{matrices[i].sizes().vec(), ranks[i], matrices[i].scalar_type(), started}].members.push_back(i);
  }
  const auto stacked = [](at::TensorList list, const std::vector<size_t>& members, bool wide) {
    std::vector<at::Tensor> parts;
    for (const size_t i : members) parts.push_back(wide ? list[i] : list[i].mT());
    return at::stack(parts).flatten(0, -3).to(at::kDouble);
  };
  std::vector<Group*> started;
  std::vector<at::Tensor> near;
  for (auto& [kind, group] : groups) {
    const auto& [sizes, rank, type, from_bases] = kind;
    const bool wide = sizes[sizes.size() - 2] <= sizes.back();
    group.all = stacked(matrices, group.members, wide);
    if (from_bases) {
      start(group, stacked(bases, group.members, wide).mT());
      started.push_back(&group);
      near.push_back(group.near);
    } else {
      group.basis = composed::leading(group.all, rank);
    }
  }
  const auto far = composed::far_ones(near);
  for (size_t g = 0; g < started.size(); ++g) {
    if (far[g].empty()) continue;
    Group& group = *started[g];
    const at::Tensor index = at::tensor(far[g], group.all.options().dtype(at::kLong));
    group.basis.index_copy_(0, index, composed::leading(group.all.index_select(0, index), group.basis.size(-2)));
  }
  std::vector<at::Tensor> left(matrices.size()), right(matrices.size());
  for (const auto& [kind, group] : groups) {
    const auto& [sizes, rank, type, from_bases] = kind;
    const bool wide = sizes[sizes.size() - 2] <= sizes.back();
    const at::Tensor rest = at::matmul(group.basis, group.all);
    auto shape = sizes;
    shape.insert(shape.begin(), static_cast<int64_t>(group.members.size()));
    const auto factors = [&](const at::Tensor& factor) {
      shape[shape.size() - 2] = factor.size(-2);
      shape.back() = factor.size(-1);
      return composed::apart(factor.reshape(shape), type);
    };
    const auto lefts = factors(wide ? group.basis.mT() : rest.mT()), rights = factors(wide ? rest : group.basis);
    for (size_t j = 0; j < group.members.size(); ++j) {
      left[group.members[j]] = lefts[j];
      right[group.members[j]] = rights[j];
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
