#include "csrc/ops/fake_quant_weights.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "csrc/ops/autograd/needs_graph.h"
#include "csrc/ops/autograd/record.h"

namespace cctorch::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Result = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>;

// A function has one list of outputs: the quantized weights, then their scales.
class FakeQuantWeights : public torch::autograd::Function<FakeQuantWeights> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, at::TensorList weights, int64_t bits, int64_t axis) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->set_materialize_grads(false);  // an unused weight needs no zeros
    auto [outputs, scales] = fake_quant_weights(weights, bits, axis);
    context->mark_non_differentiable(scales);
    outputs.insert(outputs.end(), scales.begin(), scales.end());
    return outputs;
  }

  static variable_list backward(AutogradContext*, const variable_list& grads) {
    const auto count = static_cast<std::ptrdiff_t>(grads.size() / 2);
    variable_list inputs(grads.begin(), grads.begin() + count);
    inputs.resize(count + 2);  // none for bits and axis
    return inputs;
  }
};

Result straight_through(at::TensorList weights, int64_t bits, int64_t axis) {
  if (!any_needs_graph(weights)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return fake_quant_weights(weights, bits, axis);
  }
  const variable_list outputs = record<FakeQuantWeights>(weights, bits, axis);
  const auto middle = outputs.begin() + static_cast<std::ptrdiff_t>(weights.size());
  return {{outputs.begin(), middle}, {middle, outputs.end()}};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Autograd, m) { m.impl("fake_quant_weights", &straight_through); }

}  // namespace cctorch::autograd
