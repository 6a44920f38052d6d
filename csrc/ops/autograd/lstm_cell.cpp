#include "csrc/ops/lstm_cell.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "csrc/ops/autograd/needs_graph.h"
#include "csrc/ops/autograd/record.h"

namespace cctorch::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class LstmCell : public torch::autograd::Function<LstmCell> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, const at::Tensor& gates, const at::Tensor& c) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->save_for_backward({gates, c});
    auto [h, next] = lstm_cell(gates, c);
    return {h, next};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    auto [gates, c] = lstm_cell_backward(grads[0], grads[1], saved[0], saved[1]);
    return {gates, c};
  }
};

bool has_tangent(const at::Tensor& x) { return x._fw_grad(0).defined(); }

std::tuple<at::Tensor, at::Tensor> differentiable(const at::Tensor& gates, const at::Tensor& c) {
  if (!needs_graph(gates, c)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return lstm_cell(gates, c);
  }
  // Function knows neither tangents nor the transforms of torch.func; PyTorch's operators do.
  if (has_tangent(gates) || has_tangent(c) || is_transforming()) return fallback::lstm_cell(gates, c);
  auto states = record<LstmCell>(gates, c);
  return {states[0], states[1]};
}

std::tuple<at::Tensor, at::Tensor> differentiable_backward(const at::Tensor& grad_h, const at::Tensor& grad_c,
                                                           const at::Tensor& gates, const at::Tensor& c) {
  // PyTorch knows the second derivative.
  if (needs_graph(grad_h, grad_c, gates, c)) return fallback::lstm_cell_backward(grad_h, grad_c, gates, c);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return lstm_cell_backward(grad_h, grad_c, gates, c);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Autograd, m) {
  m.impl("lstm_cell", &differentiable);
  m.impl("lstm_cell_backward", &differentiable_backward);
}

}  // namespace cctorch::autograd
