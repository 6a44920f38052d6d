#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "csrc/ops/autograd/needs_graph.h"

namespace cctorch::autograd {

// The differentiable form of `forward`, for an operator whose gradients are `backward(grad, the same arguments...)`, a
// tuple with one for each of the tensors. These come first among the arguments, the numbers after them.
template <auto kForward, auto kBackward>
class Recorded;

template <typename... Arguments, at::Tensor (*kForward)(Arguments...), auto kBackward>
class Recorded<kForward, kBackward> : public torch::autograd::Function<Recorded<kForward, kBackward>> {
  template <typename T>
  static constexpr bool is_tensor = std::is_same_v<std::decay_t<T>, at::Tensor>;
  static constexpr size_t kTensors = (size_t{is_tensor<Arguments>} + ...);
  static constexpr size_t kNumbers = sizeof...(Arguments) - kTensors;
  using All = std::tuple<std::decay_t<Arguments>...>;
  using Tensors = std::make_index_sequence<kTensors>;
  using Numbers = std::make_index_sequence<kNumbers>;

 public:
  static constexpr bool is_traceable = true;

  // For the Autograd key.
  static at::Tensor call(Arguments... arguments) {
    const auto all = std::tie(arguments...);
    if (!needs_graph_of(all, Tensors())) {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      return kForward(arguments...);
    }
    return Recorded::apply(arguments...);
  }

  static at::Tensor forward(torch::autograd::AutogradContext* context, Arguments... arguments) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    save(context, std::tie(arguments...), Tensors(), Numbers());
    return kForward(arguments...);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    return gradients(context, grads[0], Tensors(), Numbers());
  }

 private:
  template <typename Tuple, size_t... I>
  static bool needs_graph_of(const Tuple& all, std::index_sequence<I...>) {
    return needs_graph(std::get<I>(all)...);
  }

  // The numbers are one entry of saved_data: each takes a string, a hash and an allocation.
  template <typename Tuple, size_t... I, size_t... J>
  static void save(torch::autograd::AutogradContext* context, const Tuple& all, std::index_sequence<I...>,
                   std::index_sequence<J...>) {
    context->save_for_backward({std::get<I>(all)...});
    if constexpr (kNumbers > 0) {
      context->saved_data["numbers"] =
          c10::ivalue::Tuple::create(std::vector<c10::IValue>{std::get<kTensors + J>(all)...});
    }
  }

  template <size_t... I, size_t... J>
  static torch::autograd::variable_list gradients(torch::autograd::AutogradContext* context, const at::Tensor& grad,
                                                  std::index_sequence<I...>, std::index_sequence<J...>) {
    const auto saved = context->get_saved_variables();
    torch::autograd::variable_list results(sizeof...(Arguments));
    if constexpr (kNumbers > 0) {
      const auto& numbers = context->saved_data.at("numbers").toTupleRef().elements();
      std::tie(results[I]...) =
          kBackward(grad, saved[I]..., numbers[J].template to<std::tuple_element_t<kTensors + J, All>>()...);
    } else {
      std::tie(results[I]...) = kBackward(grad, saved[I]...);
    }
    return results;
  }
};

}  // namespace cctorch::autograd
