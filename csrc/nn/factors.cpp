#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>
#include <cctorch/collaborative.h>
#include <cctorch/low_rank.h>
#include <cctorch/nn/factors.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

namespace cctorch::nn {

namespace {

int64_t size(const std::vector<int64_t>& indices) { return static_cast<int64_t>(indices.size()); }

at::Tensor select(const at::Tensor& tensor, int64_t dimension, const std::vector<int64_t>& kept) {
  return tensor.index_select(dimension, at::tensor(kept, at::TensorOptions(tensor.device()).dtype(at::kLong)));
}

Factors spatial(const at::Tensor& weight, int64_t rank) {
  const int64_t out = weight.size(0), in = weight.size(1), high = weight.size(2), wide = weight.size(3);
  const at::Tensor matrix = weight.permute({0, 2, 1, 3}).reshape({out * high, in * wide});
  std::vector<int64_t> columns(matrix.size(1));
  std::iota(columns.begin(), columns.end(), 0);
  const auto [inner, outer] = collaborative::factorize(matrix, columns, rank);
  return {inner.view({rank, in, 1, wide}), {}, outer.view({out, high, rank, 1}).transpose(1, 2)};
}

Factors tucker(const at::Tensor& weight, int64_t rank, int64_t rank_in) {
  const auto [cores, outer, inner] = tucker2(weight.to(at::kDouble), rank, rank_in);
  return {inner[0].t().unsqueeze(-1).unsqueeze(-1), cores[0], outer[0].unsqueeze(-1).unsqueeze(-1)};
}

}  // namespace

Factors factorize(const at::Tensor& weight, const LayerPlan& plan) {
  const bool tucker_layout = plan.layout == LowRankLayout::tucker;
  TORCH_CHECK_VALUE(plan.rank && plan.rank_in.has_value() == tucker_layout, "factorize: the plan of layer '", plan.name,
                    "' has no rank", tucker_layout ? ", or no rank_in" : "", " for its layout, ",
                    to_string(plan.layout));
  const bool is_kernel = weight.dim() == 4, is_matrix = weight.dim() == 2 && plan.layout == LowRankLayout::channel;
  TORCH_CHECK_VALUE(
      (is_kernel || is_matrix) && weight.size(0) == plan.out_channels && weight.size(1) == plan.in_channels,
      "factorize: a weight of shape ", weight.sizes(), ", expected that of layer '", plan.name, "', ",
      plan.out_channels, " x ", plan.in_channels, plan.kind == LayerKind::conv2d ? " x kh x kw" : "");
  const at::Tensor dense = weight.detach();
  check_rank(plan, dense.sizes().slice(2));
  const int64_t rank = plan.rank.value_or(0), rank_in = plan.rank_in.value_or(0);
  Factors factors;
  if (plan.layout == LowRankLayout::channel) {
    std::tie(factors.first, factors.second) = collaborative::factorize(dense, plan.kept_in, rank);
  } else {
    const at::Tensor kept = select(dense, 1, plan.kept_in);
    factors = plan.layout == LowRankLayout::spatial ? spatial(kept, rank) : tucker(kept, rank, rank_in);
  }
  factors.second = select(factors.second, 0, plan.kept_out);
  for (at::Tensor* factor : {&factors.first, &factors.core, &factors.second}) {
    if (factor->defined()) *factor = factor->to(dense.options()).contiguous(dense.suggest_memory_format());
  }
  return factors;
}

Factors empty_factors(const LayerPlan& plan, int64_t out, int64_t in, at::IntArrayRef kernel) {
  const auto empty = [&](int64_t rows, int64_t columns, bool high, bool wide) {
    std::vector<int64_t> sizes = {rows, columns};
    if (!kernel.empty()) sizes.insert(sizes.end(), {high ? kernel[0] : 1, wide ? kernel[1] : 1});
    return at::empty(sizes);
  };
  const int64_t rank = plan.rank.value_or(0), rank_in = plan.rank_in.value_or(0);
  switch (plan.layout) {
    case LowRankLayout::channel:
      return {empty(rank, in, true, true), {}, empty(out, rank, false, false)};
    case LowRankLayout::spatial:
      return {empty(rank, in, false, true), {}, empty(out, rank, true, false)};
    case LowRankLayout::tucker:
      return {empty(rank_in, in, false, false), empty(rank, rank_in, true, true), empty(out, rank, false, false)};
  }
  TORCH_INTERNAL_ASSERT(false, "unknown LowRankLayout");
}

void check_rank(const LayerPlan& plan, at::IntArrayRef kernel) {
  // A plan's own check has seen the ranks of the layout tucker, which are of channels.
  if (!plan.rank || plan.layout == LowRankLayout::tucker) return;
  const bool is_spatial = plan.layout == LowRankLayout::spatial;
  const int64_t rows = plan.out_channels * (is_spatial ? kernel[0] : 1);
  const int64_t columns = size(plan.kept_in) * (is_spatial ? kernel[1] : c10::multiply_integers(kernel));
  const int64_t most = std::min(rows, columns);
  TORCH_CHECK_VALUE(*plan.rank <= most, "layer '", plan.name, "': rank = ", *plan.rank, ", expected at most ", most,
                    ": its weight restricted to the kept inputs is a matrix of ", rows, " x ", columns);
}

}  // namespace cctorch::nn
