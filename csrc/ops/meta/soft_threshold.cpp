#include "csrc/ops/soft_threshold.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"

namespace cctorch::meta {
namespace {

at::Tensor soft_threshold(const at::Tensor& x, const at::Tensor& threshold, std::optional<int64_t> axis) {
  check_soft_threshold(x, threshold, axis);
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor> soft_threshold_backward(const at::Tensor& grad, const at::Tensor& x,
                                                           const at::Tensor& threshold, std::optional<int64_t> axis) {
  check_soft_threshold(x, threshold, axis);
  check_backward(grad, x, "soft_threshold_backward");
  return {at::empty_like(x), at::empty_like(threshold)};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Meta, m) {
  m.impl("soft_threshold", &soft_threshold);
  m.impl("soft_threshold_backward", &soft_threshold_backward);
}

}  // namespace cctorch::meta
