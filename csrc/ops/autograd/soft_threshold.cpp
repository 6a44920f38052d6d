#include "csrc/ops/soft_threshold.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "csrc/ops/autograd/needs_graph.h"

namespace cctorch::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class SoftThreshold : public torch::autograd::Function<SoftThreshold> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& threshold,
                            std::optional<int64_t> axis) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->save_for_backward({x, threshold});
    context->saved_data["axis"] = axis;
    return soft_threshold(x, threshold, axis);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto axis = context->saved_data.at("axis").toOptional<int64_t>();
    auto [grad_x, grad_threshold] = soft_threshold_backward(grads[0], saved[0], saved[1], axis);
    return {grad_x, grad_threshold, {}};
  }
};

at::Tensor differentiable(const at::Tensor& x, const at::Tensor& threshold, std::optional<int64_t> axis) {
  if (!needs_graph(x, threshold)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return soft_threshold(x, threshold, axis);
  }
  return SoftThreshold::apply(x, threshold, axis);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Autograd, m) {
  m.impl("soft_threshold", &differentiable);
  m.impl("soft_threshold_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace cctorch::autograd
