#include <ATen/ATen.h>
#include <torch/library.h>

#include "csrc/ops/best_grids.h"
#include "csrc/ops/rows.h"
#include "csrc/ops/value_grid.h"

namespace cctorch::composite {

at::Tensor binary_quant(const at::Tensor& x, std::optional<int64_t> axis) {
  axis = check_value_grid("binary_quant", x, axis);
  const at::Tensor rows = as_rows(x, axis);
  const at::Tensor magnitude = rows.abs().mean(-1, /*keepdim=*/true, at::kDouble).to(x.scalar_type());
  return like(x, with_sign_of(magnitude, rows), axis);
}

std::vector<at::Tensor> binary_quant_list(at::TensorList x, std::optional<int64_t> axis) {
  check_value_grid("binary_quant", x, axis);
  return map_rows(x, axis, [](const at::Tensor& rows) { return binary_quant(rows, 0); });
}

namespace {

at::Tensor ternary_quant(const at::Tensor& x, std::optional<int64_t> axis) {
  axis = check_value_grid("ternary_quant", x, axis);
  if (x.numel() == 0) return at::empty_like(x);
  const at::Tensor rows = as_rows(x, axis).to(at::kDouble);
  const at::Tensor reach = ternary_reach(rows);
  return like(x, at::where(rows.abs() * 2 <= reach, 0.0, with_sign_of(reach, rows)), axis);
}

at::Tensor binary_code_quant(const at::Tensor& x, int64_t bits, std::string_view method, std::optional<int64_t> axis) {
  axis = check_binary_code_quant(x, bits, method, axis);
  if (x.numel() == 0) return at::empty_like(x);
  const at::Tensor rows = as_rows(x, axis).to(at::kDouble);
  return like(x, method == "greedy" ? composed::greedy_code(rows, bits) : composed::fitted_code(rows, bits), axis);
}

std::vector<at::Tensor> ternary_quant_list(at::TensorList x, std::optional<int64_t> axis) {
  check_value_grid("ternary_quant", x, axis);
  return map_rows(x, axis, [](const at::Tensor& rows) { return ternary_quant(rows, 0); });
}

std::vector<at::Tensor> binary_code_quant_list(at::TensorList x, int64_t bits, std::string_view method,
                                               std::optional<int64_t> axis) {
  check_binary_code_quant(x, bits, method, axis);
  return map_rows(x, axis, [&](const at::Tensor& rows) { return binary_code_quant(rows, bits, method, 0); });
}

// What lies halfway between two values rounds down to the type of x: whether x is above stays exactly the same. The sum
// of the halves rounds in float64 too, to `near`; `missed` is what that left out (Knuth's TwoSum).
at::Tensor bounds_between(const at::Tensor& ascending) {
  const int64_t gaps = ascending.size(0) - 1;
  const at::Tensor halves = ascending.to(at::kDouble) / 2;
  const at::Tensor low = halves.narrow(0, 0, gaps), high = halves.narrow(0, 1, gaps);
  const at::Tensor near = low + high;
  const at::Tensor of_high = near - low;
  const at::Tensor missed = (low - (near - of_high)) + (high - of_high);
  const at::Tensor bounds = near.to(ascending.scalar_type());
  const at::Tensor excess = bounds.to(at::kDouble) - near;
  const at::Tensor below = at::nextafter(bounds, at::full_like(bounds, -std::numeric_limits<double>::infinity()));
  return at::where((excess > 0).logical_or((excess == 0).logical_and(missed < 0)), below, bounds).contiguous();
}

}  // namespace

at::Tensor codebook_indices(const at::Tensor& x, const at::Tensor& codebook) {
  check_codebook("codebook_indices", x, codebook);
  const auto [ascending, order] = at::sort(codebook);
  const at::Tensor dense = x.to(codebook.scalar_type()).contiguous();
  const at::Tensor unknown = codebook.isnan();
  const at::Tensor places = at::where(unknown.any(), unknown.to(at::kByte).argmax(), order);
  return places.index({at::searchsorted(bounds_between(ascending), dense)});
}

at::Tensor codebook_quant(const at::Tensor& x, const at::Tensor& codebook) {
  check_codebook("codebook_quant", x, codebook);
  const at::Tensor values = codebook.index({codebook_indices(x, codebook)});
  return at::empty_like(x).copy_(at::where(x.isnan(), x, values.to(x.scalar_type())));
}

at::Tensor codebook_update(const at::Tensor& x, const at::Tensor& codebook) {
  check_codebook("codebook_update", x, codebook);
  const auto [ascending, order] = at::sort(codebook.to(at::kDouble));
  const SortedRows sorted(x.reshape({1, -1}).to(at::kDouble));
  const at::Tensor updated = kmeans_step(sorted, ascending.unsqueeze(0)).squeeze(0);
  const at::Tensor moved =
      at::empty_like(codebook, at::MemoryFormat::Contiguous).index_copy_(0, order, updated.to(codebook.scalar_type()));
  // The running sums end with that of all; a pass over x of its own would take as long as all else but the sort.
  const at::Tensor mean = (sorted.sums().select(-1, x.numel()) / x.numel()).to(codebook.scalar_type());
  const at::Tensor unknown = codebook.isnan();
  const at::Tensor first = unknown.logical_and(unknown.cumsum(0) == 1);
  return at::where(unknown.any(), at::where(first, mean, codebook), moved);
}

at::Tensor member_sums(const at::Tensor& values, const at::Tensor& x, const at::Tensor& codebook) {
  constexpr int64_t kCopiesOnGpu = 1024;
  return sums_of_members(values.reshape(-1).to(codebook.scalar_type()), codebook_indices(x, codebook).reshape(-1),
                         codebook.size(0), x.is_cuda() ? kCopiesOnGpu : 1);
}

std::vector<at::Tensor> codebook_quant_list(at::TensorList x, at::TensorList codebook) {
  check_codebooks("codebook_quant", x, codebook);
  std::vector<at::Tensor> ys;
  for (size_t i = 0; i < x.size(); ++i) ys.push_back(codebook_quant(x[i], codebook[i]));
  return ys;
}

std::vector<at::Tensor> codebook_update_list(at::TensorList x, at::TensorList codebook) {
  check_codebooks("codebook_update", x, codebook);
  std::vector<at::Tensor> updated;
  for (size_t i = 0; i < x.size(); ++i) updated.push_back(cctorch::codebook_update(x[i], codebook[i]));
  return updated;
}

std::vector<at::Tensor> member_sums_list(at::TensorList values, at::TensorList x, at::TensorList codebook) {
  std::vector<at::Tensor> sums;
  for (size_t i = 0; i < x.size(); ++i) sums.push_back(cctorch::member_sums(values[i], x[i], codebook[i]));
  return sums;
}

TORCH_LIBRARY_IMPL(cctorch, CompositeExplicitAutograd, m) {
  m.impl("binary_quant", &binary_quant);
  m.impl("ternary_quant", &ternary_quant);
  m.impl("binary_code_quant", &binary_code_quant);
  m.impl("binary_quant.list", &binary_quant_list);
  m.impl("ternary_quant.list", &ternary_quant_list);
  m.impl("binary_code_quant.list", &binary_code_quant_list);
  m.impl("codebook_quant", &codebook_quant);
  m.impl("codebook_indices", &codebook_indices);
  m.impl("codebook_update", &codebook_update);
  m.impl("codebook_quant.list", &codebook_quant_list);
  m.impl("codebook_update.list", &codebook_update_list);
  m.impl("_member_sums", &member_sums);
  m.impl("_member_sums.list", &member_sums_list);
}

// Neither torch.vmap nor batches of gradients (is_grads_batched, an older vmap) have a fallback for lists of tensors.
TORCH_LIBRARY_IMPL(cctorch, FuncTorchBatchedDecomposition, m) { m.impl("_member_sums.list", &member_sums_list); }
TORCH_LIBRARY_IMPL(cctorch, Batched, m) { m.impl("_member_sums.list", &member_sums_list); }

}  // namespace cctorch::composite
