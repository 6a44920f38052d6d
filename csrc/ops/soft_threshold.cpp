#include "csrc/ops/soft_threshold.h"

#include <torch/library.h>

#include "csrc/ops/learned_grid.h"

namespace cctorch {

at::Tensor soft_threshold(const at::Tensor& x, const at::Tensor& threshold, std::optional<int64_t> axis) {
  static const auto op = find_operator<SoftThresholdOp>("cctorch::soft_threshold");
  return op.call(x, threshold, axis);
}

std::tuple<at::Tensor, at::Tensor> soft_threshold_backward(const at::Tensor& grad, const at::Tensor& x,
                                                           const at::Tensor& threshold, std::optional<int64_t> axis) {
  static const auto op = find_operator<decltype(soft_threshold_backward)>("cctorch::soft_threshold_backward");
  return op.call(grad, x, threshold, axis);
}

std::vector<at::Tensor> soft_threshold(at::TensorList x, at::TensorList threshold, std::optional<int64_t> axis) {
  static const auto op = find_operator<SoftThresholdListOp>("cctorch::soft_threshold", "list");
  return op.call(x, threshold, axis);
}

Lists<2> soft_threshold_list_backward(at::TensorList grad, at::TensorList x, at::TensorList threshold,
                                      std::optional<int64_t> axis) {
  static const auto op =
      find_operator<decltype(soft_threshold_list_backward)>("cctorch::soft_threshold_backward", "list");
  return op.call(grad, x, threshold, axis);
}

std::optional<int64_t> check_soft_threshold(const at::Tensor& x, const at::Tensor& threshold,
                                            std::optional<int64_t> axis) {
  return check_grid_parameter("soft_threshold", x, threshold, "threshold", axis);
}

void check_soft_threshold(at::TensorList x, at::TensorList threshold, std::optional<int64_t> axis) {
  check_grid_parameters("soft_threshold", x, threshold, "threshold", axis);
}

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("soft_threshold(Tensor x, Tensor threshold, int? axis=None) -> Tensor", tags);
  m.def("soft_threshold_backward(Tensor grad, Tensor x, Tensor threshold, int? axis) -> (Tensor, Tensor)", tags);
  m.def("soft_threshold.list(Tensor[] x, Tensor[] threshold, int? axis=None) -> Tensor[]", tags);
  m.def(
      "soft_threshold_backward.list(Tensor[] grad, Tensor[] x, Tensor[] threshold, int? axis) -> (Tensor[], Tensor[])",
      tags);
}

}  // namespace cctorch
