#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "csrc/ops/autograd/needs_graph.h"
#include "csrc/ops/autograd/record.h"

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
    return record<Recorded>(arguments...);
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

// The same for lists: `forward` takes lists of as many tensors each and makes such a list, of which element i depends
// on element i of each of them alone; `backward` gives a list for each. What is not used has no gradient and takes no
// part.
template <typename... Arguments, std::vector<at::Tensor> (*kForward)(Arguments...), auto kBackward>
class Recorded<kForward, kBackward> : public torch::autograd::Function<Recorded<kForward, kBackward>> {
  template <typename T>
  static constexpr bool is_list = std::is_same_v<std::decay_t<T>, at::TensorList>;
  static constexpr size_t kLists = (size_t{is_list<Arguments>} + ...);
  static constexpr size_t kNumbers = sizeof...(Arguments) - kLists;
  using All = std::tuple<std::decay_t<Arguments>...>;
  using ListIndices = std::make_index_sequence<kLists>;
  using NumberIndices = std::make_index_sequence<kNumbers>;

 public:
  static constexpr bool is_traceable = true;

  // For the Autograd key.
  static std::vector<at::Tensor> call(Arguments... arguments) {
    const All all(arguments...);
    const auto tensors = joined(all, ListIndices());
    if (!any_needs_graph(tensors)) {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      return kForward(arguments...);
    }
    return record<Recorded>(at::TensorList(tensors), all);
  }

  // `tensors` are those of the lists one after the other; only they count as inputs.
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, at::TensorList tensors,
                                                const All& all) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->set_materialize_grads(false);
    context->save_for_backward(tensors.vec());
    save_numbers(context, all, NumberIndices());
    return std::apply(kForward, all);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    return gradients(context, grads, ListIndices(), NumberIndices());
  }

 private:
  // Numbers are for all tensors; a list of them has one for each, or none.
  template <typename T>
  static T taken(const T& number, const std::vector<size_t>&) {
    return number;
  }
  template <typename T>
  static std::vector<T> taken(const std::vector<T>& all, const std::vector<size_t>& used) {
    return all.empty() ? all : taken(c10::ArrayRef<T>(all), used);
  }
  template <typename T>
  static std::vector<T> taken(c10::ArrayRef<T> all, const std::vector<size_t>& used) {
    std::vector<T> result;
    for (const size_t i : used) result.push_back(all[i]);
    return result;
  }
  template <typename T>
  using Kept = std::conditional_t<std::is_same_v<T, at::ArrayRef<double>>, std::vector<double>, T>;

  template <size_t... I>
  static torch::autograd::variable_list joined(const All& all, std::index_sequence<I...>) {
    torch::autograd::variable_list tensors;
    (tensors.insert(tensors.end(), std::get<I>(all).begin(), std::get<I>(all).end()), ...);
    return tensors;
  }

  template <size_t... J>
  static void save_numbers(torch::autograd::AutogradContext* context, const All& all, std::index_sequence<J...>) {
    context->saved_data["numbers"] = c10::ivalue::Tuple::create(std::vector<c10::IValue>{std::get<kLists + J>(all)...});
  }

  template <size_t... I, size_t... J>
  static torch::autograd::variable_list gradients(torch::autograd::AutogradContext* context,
                                                  const torch::autograd::variable_list& grads,
                                                  std::index_sequence<I...>, std::index_sequence<J...>) {
    const auto saved = context->get_saved_variables();
    const size_t count = grads.size();
    std::vector<size_t> used;
    for (size_t i = 0; i < count; ++i) {
      if (grads[i].defined()) used.push_back(i);
    }
    torch::autograd::variable_list results(kLists * count + 1);  // none for the numbers
    if (used.empty()) return results;
    const auto list = [&](size_t i) { return taken(at::TensorList(saved).slice(i * count, count), used); };
    const auto& numbers = context->saved_data.at("numbers").toTupleRef().elements();
    const auto lists = kBackward(taken(at::TensorList(grads), used), list(I)...,
                                 taken(numbers[J].template to<Kept<std::tuple_element_t<kLists + J, All>>>(), used)...);
    const auto place = [&](const std::vector<at::Tensor>& gradients, size_t i) {
      for (size_t j = 0; j < used.size(); ++j) results[i * count + used[j]] = gradients[j];
    };
    (place(std::get<I>(lists), I), ...);
    return results;
  }
};

}  // namespace cctorch::autograd
