#include "csrc/ops/batch_norm.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "csrc/ops/autograd/needs_graph.h"
#include "csrc/ops/autograd/record.h"

namespace cctorch::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class BatchNorm : public torch::autograd::Function<BatchNorm> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                               const at::Tensor& bias, double eps) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [y, mean, inverse_deviation] = batch_norm(x, weight, bias, eps);
    context->save_for_backward({x, weight, mean, inverse_deviation});
    context->saved_data["eps"] = eps;
    context->mark_non_differentiable({mean, inverse_deviation});
    context->set_materialize_grads(false);
    return {y, mean, inverse_deviation};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    if (!grads[0].defined()) return {{}, {}, {}, {}};
    const auto saved = context->get_saved_variables();
    const double eps = context->saved_data["eps"].toDouble();
    auto [x, weight, bias] = batch_norm_backward(grads[0], saved[0], saved[1], saved[2], saved[3], eps);
    return {x, weight, bias, {}};
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> differentiable(const at::Tensor& x, const at::Tensor& weight,
                                                              const at::Tensor& bias, double eps) {
  if (!needs_graph(x, weight, bias)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return batch_norm(x, weight, bias, eps);
  }
  auto results = record<BatchNorm>(x, weight, bias, eps);
  return {results[0], results[1], results[2]};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> differentiable_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                       const at::Tensor& weight, const at::Tensor& mean,
                                                                       const at::Tensor& inverse_deviation,
                                                                       double eps) {
  // PyTorch knows the second derivative.
  if (needs_graph(grad, x, weight)) return fallback::batch_norm_backward(grad, x, weight, mean, inverse_deviation, eps);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return batch_norm_backward(grad, x, weight, mean, inverse_deviation, eps);
}

at::Tensor differentiable_inference(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                    const at::Tensor& mean, const at::Tensor& var, double eps) {
  // PyTorch knows the derivative.
  if (needs_graph(x, weight, bias)) return fallback::batch_norm_inference(x, weight, bias, mean, var, eps);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return batch_norm_inference(x, weight, bias, mean, var, eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Autograd, m) {
  m.impl("batch_norm", &differentiable);
  m.impl("batch_norm_backward", &differentiable_backward);
  m.impl("batch_norm_inference", &differentiable_inference);
}

}  // namespace cctorch::autograd
