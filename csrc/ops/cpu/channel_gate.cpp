#include "csrc/ops/channel_gate.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/cpu/channelwise.h"

namespace cctorch::cpu {
namespace {

template <typename Function>
auto with_formula(const at::Tensor& x, const Function& function) {
  return x.scalar_type() == at::kDouble ? function(formula::ChannelGate<double>{})
                                        : function(formula::ChannelGate<float>{});
}

at::Tensor channel_gate(const at::Tensor& x, const at::Tensor& gate) {
  check_channel_gate(x, gate);
  const at::Tensor y = at::empty_like(x);
  if (x.numel() == 0) return y;
  const at::Tensor dense = channelwise::densified(x, y);
  with_formula(x, [&](const auto& formula) {
    using T = typename std::decay_t<decltype(formula)>::value_type;
    const at::Tensor gates = gate.to(c10::CppTypeToScalarType<T>::value).contiguous();
    channelwise::forward(formula, channelwise::layout(dense, 1), y, dense, gates.const_data_ptr<T>());
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> channel_gate_backward(const at::Tensor& grad, const at::Tensor& x,
                                                         const at::Tensor& gate) {
  check_channel_gate(x, gate);
  check_backward(grad, x, "channel_gate_backward");
  const at::Tensor grad_x = at::empty_like(x);
  const at::Tensor grad_gate = at::empty_like(gate);
  if (x.numel() == 0) return {grad_x, grad_gate.zero_()};
  const at::Tensor dense = channelwise::densified(x, grad_x);
  const at::Tensor dense_grad = channelwise::densified(grad, grad_x);
  with_formula(x, [&](const auto& formula) {
    using T = typename std::decay_t<decltype(formula)>::value_type;
    const at::Tensor gates = gate.to(c10::CppTypeToScalarType<T>::value).contiguous();
    const auto sums = channelwise::backward(formula, channelwise::layout(dense, 1), grad_x, dense_grad, dense,
                                            gates.const_data_ptr<T>());
    channelwise::store([&](int64_t i) { return sums[i]; }, grad_gate);
  });
  return {grad_x, grad_gate};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) {
  m.impl("channel_gate", &channel_gate);
  m.impl("channel_gate_backward", &channel_gate_backward);
}

}  // namespace cctorch::cpu
