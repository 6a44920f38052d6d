#include "csrc/ops/fake_quant.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "csrc/ops/autograd/needs_graph.h"

namespace cctorch::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class FakeQuant : public torch::autograd::Function<FakeQuant> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& log_scale, int64_t qmin,
                            int64_t qmax, std::optional<int64_t> axis, double grad_scale) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->save_for_backward({x, log_scale});
    context->saved_data["qmin"] = qmin;
    context->saved_data["qmax"] = qmax;
    context->saved_data["axis"] = axis;
    context->saved_data["grad_scale"] = grad_scale;
    return fake_quant(x, log_scale, qmin, qmax, axis, grad_scale);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const auto& data = context->saved_data;
    auto [grad_x, grad_log_scale] =
        fake_quant_backward(grads[0], saved[0], saved[1], data.at("qmin").toInt(), data.at("qmax").toInt(),
                            data.at("axis").toOptional<int64_t>(), data.at("grad_scale").toDouble());
    return {grad_x, grad_log_scale, {}, {}, {}, {}};
  }
};

at::Tensor differentiable(const at::Tensor& x, const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                          std::optional<int64_t> axis, double grad_scale) {
  if (!needs_graph(x, log_scale)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return fake_quant(x, log_scale, qmin, qmax, axis, grad_scale);
  }
  return FakeQuant::apply(x, log_scale, qmin, qmax, axis, grad_scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Autograd, m) {
  m.impl("fake_quant", &differentiable);
  m.impl("fake_quant_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace cctorch::autograd
