#include "csrc/ops/soft_threshold.h"

#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/cpu/learned_grid.h"

namespace cctorch::cpu {
namespace {

using learned_grid::with_math_type;

at::Tensor soft_threshold(const at::Tensor& x, const at::Tensor& threshold, std::optional<int64_t> axis) {
  axis = check_soft_threshold(x, threshold, axis);
  return with_math_type(x, [&](auto zero) {
    return learned_grid::forward(formula::SoftThreshold<decltype(zero)>{}, x, axis, threshold);
  });
}

std::tuple<at::Tensor, at::Tensor> soft_threshold_backward(const at::Tensor& grad, const at::Tensor& x,
                                                           const at::Tensor& threshold, std::optional<int64_t> axis) {
  axis = check_soft_threshold(x, threshold, axis);
  check_backward(grad, x, "soft_threshold_backward");
  return with_math_type(x, [&](auto zero) {
    return learned_grid::backward(formula::SoftThreshold<decltype(zero)>{}, grad, x, axis, 1.0, threshold);
  });
}

std::vector<at::Tensor> soft_threshold_list(at::TensorList x, at::TensorList threshold, std::optional<int64_t> axis) {
  check_soft_threshold(x, threshold, axis);
  return with_math_type(x[0], [&](auto zero) {
    return learned_grid::forward(formula::SoftThreshold<decltype(zero)>{}, x, axis, threshold);
  });
}

Lists<2> soft_threshold_list_backward(at::TensorList grad, at::TensorList x, at::TensorList threshold,
                                      std::optional<int64_t> axis) {
  check_soft_threshold(x, threshold, axis);
  check_backward(grad, x, "soft_threshold_backward");
  return with_math_type(x[0], [&](auto zero) {
    return learned_grid::backward(formula::SoftThreshold<decltype(zero)>{}, grad, x, axis, {}, threshold);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) {
  m.impl("soft_threshold", &soft_threshold);
  m.impl("soft_threshold_backward", &soft_threshold_backward);
  m.impl("soft_threshold.list", &soft_threshold_list);
  m.impl("soft_threshold_backward.list", &soft_threshold_list_backward);
}

}  // namespace cctorch::cpu
