#include "csrc/ops/channel_gate.h"

#include <ATen/ops/add.h>
#include <torch/library.h>

#include "csrc/ops/autograd/record.h"
#include "csrc/ops/autograd/recorded.h"

namespace cctorch::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class ChannelGateBackward : public torch::autograd::Function<ChannelGateBackward> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, const at::Tensor& grad, const at::Tensor& x,
                               const at::Tensor& gate) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->save_for_backward({grad, x, gate});
    auto [grad_x, grad_gate] = channel_gate_backward(grad, x, gate);
    return {grad_x, grad_gate};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const at::Tensor& grad = saved[0];
    const at::Tensor& x = saved[1];
    const at::Tensor& gate = saved[2];
    auto [from_grad_x, to_gate] = channel_gate_backward(grads[0], grad, gate);
    return {at::add(from_grad_x, channel_gate(x, grads[1])), channel_gate(grad, grads[1]), to_gate};
  }
};

std::tuple<at::Tensor, at::Tensor> differentiable_backward(const at::Tensor& grad, const at::Tensor& x,
                                                           const at::Tensor& gate) {
  if (!needs_graph(grad, x, gate)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return channel_gate_backward(grad, x, gate);
  }
  auto results = record<ChannelGateBackward>(grad, x, gate);
  return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Autograd, m) {
  m.impl("channel_gate", &Recorded<&channel_gate, &channel_gate_backward>::call);
  m.impl("channel_gate_backward", &differentiable_backward);
}

}  // namespace cctorch::autograd
