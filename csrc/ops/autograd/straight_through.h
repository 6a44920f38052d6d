#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

#include "csrc/ops/autograd/needs_graph.h"
#include "csrc/ops/autograd/record.h"

namespace cctorch::autograd {

// The differentiable form of `forward`: the gradient goes to the first argument, a tensor, as it is.
template <auto kForward>
class StraightThrough;

template <typename... Rest, at::Tensor (*kForward)(const at::Tensor&, Rest...)>
class StraightThrough<kForward> : public torch::autograd::Function<StraightThrough<kForward>> {
 public:
  static constexpr bool is_traceable = true;

  // For the Autograd key.
  static at::Tensor call(const at::Tensor& x, Rest... rest) {
    if (!needs_graph(x)) {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      return kForward(x, rest...);
    }
    return record<StraightThrough>(x, rest...);
  }

  static at::Tensor forward(torch::autograd::AutogradContext*, const at::Tensor& x, Rest... rest) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return kForward(x, rest...);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 const torch::autograd::variable_list& grads) {
    torch::autograd::variable_list results(1 + sizeof...(Rest));
    results[0] = grads[0];
    return results;
  }
};

// The same for a list: each result has the gradient of the tensor at its place. One that is not used has none.
template <typename... Rest, std::vector<at::Tensor> (*kForward)(at::TensorList, Rest...)>
class StraightThrough<kForward> : public torch::autograd::Function<StraightThrough<kForward>> {
 public:
  static constexpr bool is_traceable = true;

  static std::vector<at::Tensor> call(at::TensorList xs, Rest... rest) {
    if (!any_needs_graph(xs)) {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      return kForward(xs, rest...);
    }
    return record<StraightThrough>(xs, rest...);
  }

  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, at::TensorList xs,
                                                Rest... rest) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->set_materialize_grads(false);
    return kForward(xs, rest...);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 torch::autograd::variable_list grads) {
    grads.resize(grads.size() + sizeof...(Rest));
    return grads;
  }
};

// The form of a function without gradients: its results, and what it writes to, are constants.
template <auto kForward>
struct Constant;

template <typename Result, typename... Arguments, Result (*kForward)(Arguments...)>
struct Constant<kForward> {
  static Result call(Arguments... arguments) {
    at::AutoDispatchBelowAutograd below_autograd;
    return kForward(arguments...);
  }
};

}  // namespace cctorch::autograd
