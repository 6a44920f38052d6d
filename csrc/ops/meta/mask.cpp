#include "csrc/ops/mask.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace cctorch::meta {
namespace {

std::vector<at::Tensor> magnitude_masks(at::TensorList weights, double sparsity) {
  check_magnitude_masks(weights, sparsity);
  std::vector<at::Tensor> masks;
  for (const auto& weight : weights) masks.push_back(empty_mask(weight));
  return masks;
}

at::Tensor nm_mask(const at::Tensor& weight, int64_t n, int64_t m, int64_t axis) {
  check_nm_mask(weight, n, m, axis);
  return empty_mask(weight);
}

at::Tensor channel_mask(const at::Tensor& weight, double sparsity, int64_t axis) {
  check_channel_mask(weight, sparsity, axis);
  return empty_mask(weight);
}

at::Tensor apply_mask(const at::Tensor& weight, const at::Tensor& mask) {
  check_apply_mask(weight, mask);
  return at::empty_like(weight);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Meta, m) {
  m.impl("magnitude_masks", &magnitude_masks);
  m.impl("nm_mask", &nm_mask);
  m.impl("channel_mask", &channel_mask);
  m.impl("apply_mask", &apply_mask);
}

}  // namespace cctorch::meta
