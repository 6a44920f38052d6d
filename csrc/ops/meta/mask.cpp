#include "csrc/ops/mask.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace cctorch::meta {
namespace {

std::vector<at::Tensor> empty_masks(at::TensorList weights) {
  std::vector<at::Tensor> masks;
  for (const auto& weight : weights) masks.push_back(empty_mask(weight));
  return masks;
}

std::vector<at::Tensor> magnitude_masks(at::TensorList weights, double sparsity) {
  check_magnitudes("magnitude_masks", weights, sparsity);
  return empty_masks(weights);
}

std::vector<at::Tensor> magnitude_prune(at::TensorList weights, double sparsity) {
  check_magnitudes("magnitude_prune", weights, sparsity);
  std::vector<at::Tensor> pruned;
  for (const auto& weight : weights) pruned.push_back(at::empty_like(weight));
  return pruned;
}

std::vector<at::Tensor> nm_masks(at::TensorList weights, int64_t n, int64_t m, int64_t axis) {
  check_nm_masks(weights, n, m, axis);
  return empty_masks(weights);
}

std::vector<at::Tensor> channel_masks(at::TensorList weights, double sparsity, int64_t axis) {
  check_channel_masks(weights, sparsity, axis);
  return empty_masks(weights);
}

std::vector<at::Tensor> block_masks(at::TensorList weights, double sparsity, int64_t rows, int64_t columns) {
  check_block_masks(weights, sparsity, rows, columns);
  return empty_masks(weights);
}

at::Tensor apply_mask(const at::Tensor& weight, const at::Tensor& mask) {
  check_apply_mask(weight, mask);
  return at::empty_like(weight);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Meta, m) {
  m.impl("magnitude_masks", &magnitude_masks);
  m.impl("magnitude_prune", &magnitude_prune);
  m.impl("nm_masks", &nm_masks);
  m.impl("channel_masks", &channel_masks);
  m.impl("block_masks", &block_masks);
  m.impl("apply_mask", &apply_mask);
}

}  // namespace cctorch::meta
