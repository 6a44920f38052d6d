#include "csrc/ops/soft_threshold.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/cpu/channelwise.h"

namespace cctorch::cpu {
namespace {

template <typename Function>
auto with_formula(const at::Tensor& x, const Function& function) {
  return x.scalar_type() == at::kDouble ? function(formula::SoftThreshold<double>{})
                                        : function(formula::SoftThreshold<float>{});
}

at::Tensor soft_threshold(const at::Tensor& x, const at::Tensor& threshold, std::optional<int64_t> axis) {
  axis = check_soft_threshold(x, threshold, axis);
  const at::Tensor y = at::empty_like(x);
  if (x.numel() == 0) return y;
  const at::Tensor dense = channelwise::densified(x, y);
  const at::Tensor thresholds = threshold.contiguous();
  with_formula(x, [&](const auto& formula) {
    using T = typename std::decay_t<decltype(formula)>::value_type;
    channelwise::forward(formula, channelwise::layout(dense, axis), y, dense, thresholds.const_data_ptr<T>());
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> soft_threshold_backward(const at::Tensor& grad, const at::Tensor& x,
                                                           const at::Tensor& threshold, std::optional<int64_t> axis) {
  axis = check_soft_threshold(x, threshold, axis);
  check_backward(grad, x, "soft_threshold_backward");
  const at::Tensor grad_x = at::empty_like(x);
  const at::Tensor grad_threshold = at::empty_like(threshold);
  if (x.numel() == 0) return {grad_x, grad_threshold.zero_()};
  const at::Tensor dense = channelwise::densified(x, grad_x);
  const at::Tensor dense_grad = channelwise::densified(grad, grad_x);
  const at::Tensor thresholds = threshold.contiguous();
  with_formula(x, [&](const auto& formula) {
    using T = typename std::decay_t<decltype(formula)>::value_type;
    const auto sums = channelwise::backward(formula, channelwise::layout(dense, axis), grad_x, dense_grad, dense,
                                            thresholds.const_data_ptr<T>());
    channelwise::store([&](int64_t i) { return sums[i]; }, grad_threshold);
  });
  return {grad_x, grad_threshold};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) {
  m.impl("soft_threshold", &soft_threshold);
  m.impl("soft_threshold_backward", &soft_threshold_backward);
}

}  // namespace cctorch::cpu
