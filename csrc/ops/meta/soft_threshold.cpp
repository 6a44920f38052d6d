#include "csrc/ops/soft_threshold.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/meta/lists.h"

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
  return {at::empty_like(x), at::empty_like(threshold, at::MemoryFormat::Contiguous)};
}

std::vector<at::Tensor> soft_threshold_list(at::TensorList x, at::TensorList threshold, std::optional<int64_t> axis) {
  check_soft_threshold(x, threshold, axis);
  return empty_list_like(x);
}

Lists<2> soft_threshold_list_backward(at::TensorList grad, at::TensorList x, at::TensorList threshold,
                                      std::optional<int64_t> axis) {
  check_soft_threshold(x, threshold, axis);
  check_backward(grad, x, "soft_threshold_backward");
  return {empty_list_like(x), empty_parameters_like(threshold)};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Meta, m) {
  m.impl("soft_threshold", &soft_threshold);
  m.impl("soft_threshold_backward", &soft_threshold_backward);
  m.impl("soft_threshold.list", &soft_threshold_list);
  m.impl("soft_threshold_backward.list", &soft_threshold_list_backward);
}

TORCH_LIBRARY_IMPL(cctorch, CompositeExplicitAutograd, m) {
  m.impl("soft_threshold.list", &WithoutTensors<&soft_threshold_list>::call);
}

}  // namespace cctorch::meta
