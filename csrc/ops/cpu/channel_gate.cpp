#include "csrc/ops/channel_gate.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/cpu/channelwise.h"

namespace cctorch::cpu {
namespace {

// function(formula, the gates as its parameters)
template <typename Function>
void with_formula(const at::Tensor& x, const at::Tensor& gate, const Function& function) {
  const auto call = [&](const auto& formula) {
    using T = typename std::decay_t<decltype(formula)>::value_type;
    const at::Tensor gates = gate.to(c10::CppTypeToScalarType<T>::value).contiguous();
    const T* values = gates.const_data_ptr<T>();
    function(formula, std::vector<T>(values, values + gates.numel()));
  };
  x.scalar_type() == at::kDouble ? call(formula::ChannelGate<double>{}) : call(formula::ChannelGate<float>{});
}

at::Tensor channel_gate(const at::Tensor& x, const at::Tensor& gate) {
  check_channel_gate(x, gate);
  const at::Tensor y = at::empty_like(x);
  if (x.numel() == 0) return y;
  const at::Tensor dense = channelwise::densified(x, y);
  with_formula(x, gate, [&](const auto& formula, const auto& gates) {
    channelwise::forward(formula, {{channelwise::layout(dense, 1), y, dense, gates, {}}});
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
  with_formula(x, gate, [&](const auto& formula, const auto& gates) {
    const auto sums =
        channelwise::backward(formula, {{channelwise::layout(dense, 1), grad_x, dense, gates, dense_grad}});
    channelwise::store([&](int64_t i) { return sums.front()[i]; }, grad_gate);
  });
  return {grad_x, grad_gate};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) {
  m.impl("channel_gate", &channel_gate);
  m.impl("channel_gate_backward", &channel_gate_backward);
}

}  // namespace cctorch::cpu
