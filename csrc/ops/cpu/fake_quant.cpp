#include "csrc/ops/fake_quant.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/cpu/channelwise.h"

namespace cctorch::cpu {
namespace {

template <typename T>
std::vector<T> scales(const at::Tensor& log_scale) {
  const at::Tensor dense = log_scale.contiguous();
  const T* from = dense.const_data_ptr<T>();
  std::vector<T> s(dense.numel());
  std::transform(from, from + s.size(), s.begin(), formula::FakeQuant<T>::scale);
  return s;
}

template <typename Function>
auto with_formula(const at::Tensor& x, int64_t qmin, int64_t qmax, const Function& function) {
  if (x.scalar_type() == at::kDouble) {
    return function(formula::FakeQuant<double>{static_cast<double>(qmin), static_cast<double>(qmax)});
  }
  return function(formula::FakeQuant<float>{static_cast<float>(qmin), static_cast<float>(qmax)});
}

at::Tensor fake_quant(const at::Tensor& x, const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                      std::optional<int64_t> axis, double) {
  axis = check_fake_quant(x, log_scale, qmin, qmax, axis);
  const at::Tensor y = at::empty_like(x);
  if (x.numel() == 0) return y;
  const at::Tensor dense = channelwise::densified(x, y);
  with_formula(x, qmin, qmax, [&](const auto& formula) {
    using T = typename std::decay_t<decltype(formula)>::value_type;
    channelwise::forward(formula, channelwise::layout(dense, axis), y, dense, scales<T>(log_scale).data());
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> fake_quant_backward(const at::Tensor& grad, const at::Tensor& x,
                                                       const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                                                       std::optional<int64_t> axis, double grad_scale) {
  axis = check_fake_quant(x, log_scale, qmin, qmax, axis);
  check_backward(grad, x, "fake_quant_backward");
  const at::Tensor grad_x = at::empty_like(x);
  const at::Tensor grad_log_scale = at::empty_like(log_scale);
  if (x.numel() == 0) return {grad_x, grad_log_scale.zero_()};
  const at::Tensor dense = channelwise::densified(x, grad_x);
  const at::Tensor dense_grad = channelwise::densified(grad, grad_x);
  with_formula(x, qmin, qmax, [&](const auto& formula) {
    using T = typename std::decay_t<decltype(formula)>::value_type;
    const auto sums = channelwise::backward(formula, channelwise::layout(dense, axis), grad_x, dense_grad, dense,
                                            scales<T>(log_scale).data());
    channelwise::store(sums, grad_log_scale, grad_scale);
  });
  return {grad_x, grad_log_scale};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) {
  m.impl("fake_quant", &fake_quant);
  m.impl("fake_quant_backward", &fake_quant_backward);
}

}  // namespace cctorch::cpu
