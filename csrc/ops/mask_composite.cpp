#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "csrc/ops/mask.h"

namespace cctorch::composite {
namespace {

// A list without tensors names no backend, and so comes here.
std::vector<at::Tensor> magnitude_masks(at::TensorList weights, double sparsity) {
  check_magnitude_masks(weights, sparsity);
  TORCH_CHECK(weights.empty(), "magnitude_masks: weights[0] must be on cpu or cuda, got ", weights[0].device(),
              "; move the weights to one of them");
  return {};
}

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
  // A stable descending sort puts NaN first and the lower of two tied indices first.
  const auto order = std::get<1>(at::sort(norms, /*stable=*/true, /*dim=*/-1, /*descending=*/true));
  kept.scatter_(0, order.narrow(0, 0, count), true);
  std::vector<int64_t> shape(weight.dim(), 1);
  shape[axis] = channels;
  return empty_mask(weight).copy_(kept.view(shape));
}

at::Tensor apply_mask(const at::Tensor& weight, const at::Tensor& mask) {
  check_apply_mask(weight, mask);
  const auto zero = at::scalar_tensor(0, weight.options());
  return at::empty_like(weight).copy_(at::where(mask, weight, zero));
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CompositeExplicitAutograd, m) {
  m.impl("magnitude_masks", &magnitude_masks);
  m.impl("channel_mask", &channel_mask);
  m.impl("apply_mask", &apply_mask);
}

}  // namespace cctorch::composite
