#include <ATen/TensorOperators.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/sort.h>
#include <torch/library.h>

#include <limits>

#include "csrc/ops/cpu/slice_norms.h"
#include "csrc/ops/mask.h"

// Masks of groups on CPU: one score for each, in float64, and the exact selection of magnitude_masks() among them.
// CUDA has kernels for them (kernels/group_mask.cu).
namespace cctorch::composite {
namespace {

// A list without tensors names no backend, and so comes here.
std::vector<at::Tensor> no_weights(const char* op, at::TensorList weights) {
  TORCH_CHECK(weights.empty(), op, ": weights[0] must be on cpu or cuda, got ", weights[0].device(),
              "; move the weights to one of them");
  return {};
}

std::vector<at::Tensor> magnitude_masks(at::TensorList weights, double sparsity) {
  check_magnitudes("magnitude_masks", weights, sparsity);
  return no_weights("magnitude_masks", weights);
}

std::vector<at::Tensor> magnitude_prune(at::TensorList weights, double sparsity) {
  check_magnitudes("magnitude_prune", weights, sparsity);
  return no_weights("magnitude_prune", weights);
}

std::vector<at::Tensor> nm_masks(at::TensorList weights, int64_t n, int64_t m, int64_t axis) {
  check_nm_masks(weights, n, m, axis);
  return no_weights("nm_masks", weights);
}

void check_no_nan(const at::Tensor& scores, const char* op, size_t i) {
  TORCH_CHECK(!scores.isnan().any().item<bool>(), op, ": ", nth_weight(i), " has NaN, so its parts cannot be ordered");
}

// The best slice, the first of several, is ahead of all that are not the best of theirs.
at::Tensor with_best_ahead(const at::Tensor& scores) {
  // A stable descending sort puts NaN first and the lower of two tied indices first.
  const auto order = std::get<1>(at::sort(scores, /*stable=*/true, /*dim=*/-1, /*descending=*/true));
  const auto finite = scores.clamp_max(std::numeric_limits<double>::max());
  return finite.scatter_(0, order.narrow(0, 0, 1), std::numeric_limits<double>::infinity());
}

std::vector<at::Tensor> channel_masks(at::TensorList weights, double sparsity, int64_t axis) {
  check_channel_masks(weights, sparsity, axis);
  std::vector<at::Tensor> scores, masks;
  int64_t total = 0;
  int64_t fewest = 0;
  const auto squares = cpu::squared_slice_norms(weights, axis);
  for (size_t i = 0; i < weights.size(); ++i) {
    masks.push_back(empty_mask(weights[i]));
    if (weights[i].numel() == 0) continue;
    check_no_nan(squares[i], "channel_masks", i);
    const int64_t slices = squares[i].numel();
    scores.push_back(with_best_ahead((squares[i] * slices / weights[i].numel()).sqrt()));
    total += slices;
    ++fewest;
  }
  if (total == 0) return masks;
  const int64_t count = std::max(fewest, kept_count(sparsity, total));
  const auto kept = cctorch::magnitude_masks(scores, 1 - static_cast<double>(count) / static_cast<double>(total));
  auto next = kept.begin();
  for (at::Tensor& mask : masks) {
    if (mask.numel() == 0) continue;
    std::vector<int64_t> shape(mask.dim(), 1);
    shape[axis < 0 ? axis + mask.dim() : axis] = -1;
    mask.copy_(next++->view(shape));
  }
  return masks;
}

std::vector<at::Tensor> block_masks(at::TensorList weights, double sparsity, int64_t rows, int64_t columns) {
  check_block_masks(weights, sparsity, rows, columns);
  std::vector<at::Tensor> scores, masks;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t across = weights[i].size(0) == 0 ? 0 : weights[i].numel() / weights[i].size(0) / columns;
    const auto blocks = weights[i].reshape({weights[i].size(0) / rows, rows, across, columns});
    scores.push_back(at::linalg_vector_norm(blocks, 2, {1, 3}, false, at::kDouble));
    check_no_nan(scores.back(), "block_masks", i);
  }
  const auto kept = cctorch::magnitude_masks(scores, sparsity);
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto blocks = kept[i].view({kept[i].size(0), 1, kept[i].size(1), 1});
    const auto all = blocks.expand({kept[i].size(0), rows, kept[i].size(1), columns});
    masks.push_back(empty_mask(weights[i]).copy_(all.reshape(weights[i].sizes())));
  }
  return masks;
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CompositeExplicitAutograd, m) {
  m.impl("magnitude_masks", &magnitude_masks);
  m.impl("magnitude_prune", &magnitude_prune);
  m.impl("nm_masks", &nm_masks);
  m.impl("channel_masks", &channel_masks);
  m.impl("block_masks", &block_masks);
}

}  // namespace cctorch::composite
