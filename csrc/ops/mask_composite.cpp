#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "csrc/ops/mask.h"

namespace cctorch::composite {
namespace {

// A stable descending sort puts NaN first and the lower of two tied indices first.
at::Tensor largest(const at::Tensor& magnitudes, int64_t count) {
  const auto order = std::get<1>(at::sort(magnitudes, /*stable=*/true, /*dim=*/-1, /*descending=*/true));
  return order.narrow(-1, 0, count);
}

at::Tensor in_layout_of(const at::Tensor& weight, const at::Tensor& mask) { return empty_mask(weight).copy_(mask); }

at::Tensor channel_mask(const at::Tensor& weight, double sparsity, int64_t axis) {
  axis = check_channel_mask(weight, sparsity, axis);
  const int64_t channels = weight.size(axis);
  if (weight.numel() == 0) return empty_mask(weight);
  const auto rows = weight.movedim(axis, 0).reshape({channels, -1});
  const auto norms = at::linalg_vector_norm(rows, 2, {1}, false, at::kDouble);
  if (weight.is_cpu()) {
    TORCH_CHECK(!norms.isnan().any().item<bool>(), "channel_mask: weight has NaN, so its channels cannot be ordered");
  }
  const int64_t count = std::max<int64_t>(1, kept_count(sparsity, channels));
  auto kept = at::zeros({channels}, weight.options().dtype(at::kBool));
  kept.scatter_(0, largest(norms, count), true);
  std::vector<int64_t> shape(weight.dim(), 1);
  shape[axis] = channels;
  return in_layout_of(weight, kept.view(shape));
}

at::Tensor apply_mask(const at::Tensor& weight, const at::Tensor& mask) {
  check_apply_mask(weight, mask);
  const auto zero = at::scalar_tensor(0, weight.options());
  return at::empty_like(weight).copy_(at::where(mask, weight, zero));
}

}  // namespace

std::vector<at::Tensor> magnitude_masks(at::TensorList weights, double sparsity) {
  check_magnitude_masks(weights, sparsity);
  std::vector<at::Tensor> magnitudes;
  int64_t total = 0;
  for (const auto& weight : weights) {
    magnitudes.push_back(weight.abs().reshape(-1));
    total += weight.numel();
  }
  std::vector<at::Tensor> masks;
  if (weights.empty()) return masks;
  auto kept = at::zeros({total}, weights[0].options().dtype(at::kBool));
  kept.scatter_(0, largest(at::cat(magnitudes), kept_count(sparsity, total)), true);
  int64_t begin = 0;
  for (const auto& weight : weights) {
    masks.push_back(in_layout_of(weight, kept.narrow(0, begin, weight.numel()).view(weight.sizes())));
    begin += weight.numel();
  }
  return masks;
}

at::Tensor nm_mask(const at::Tensor& weight, int64_t n, int64_t m, int64_t axis) {
  axis = check_nm_mask(weight, n, m, axis);
  if (weight.numel() == 0) return empty_mask(weight);
  const auto moved = weight.abs().movedim(axis, -1).contiguous();
  const auto groups = moved.view({-1, m});
  auto kept = at::zeros_like(groups, groups.options().dtype(at::kBool));
  kept.scatter_(-1, largest(groups, n), true);
  return in_layout_of(weight, kept.view(moved.sizes()).movedim(-1, axis));
}

TORCH_LIBRARY_IMPL(cctorch, CompositeExplicitAutograd, m) {
  m.impl("magnitude_masks", &magnitude_masks);
  m.impl("nm_mask", &nm_mask);
  m.impl("channel_mask", &channel_mask);
  m.impl("apply_mask", &apply_mask);
}

}  // namespace cctorch::composite
