#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <optional>
#include <vector>

#include "csrc/ops/channelwise.h"
#include "kernels/elementwise.cuh"
#include "kernels/launch.cuh"
#include "kernels/list.cuh"
#include "kernels/sum_channels.cuh"

// Element-wise formulas with one parameter per channel, or two; they are of the formula's type. Strided inputs are
// copied into the layout of the outputs first, so that one pass in the order of memory serves all.
namespace cctorch::cuda {

// A formula's parameters on the device: one tensor for each of their numbers.
template <typename Formula>
struct Parameters {
  using T = typename Formula::value_type;
  std::vector<at::Tensor> tensors;

  explicit Parameters(at::TensorList numbers) {
    for (const at::Tensor& tensor : numbers) tensors.push_back(tensor.contiguous());
  }
  Given<Formula> given() const {
    Given<Formula> result{};
    for (size_t i = 0; i < tensors.size(); ++i) result.numbers[i] = tensors[i].const_data_ptr<T>();
    return result;
  }
};

// What belongs to the i-th tensor of a list.
inline std::vector<at::Tensor> at_place(const std::vector<at::TensorList>& lists, size_t i) {
  std::vector<at::Tensor> tensors;
  for (const at::TensorList& list : lists) tensors.push_back(list[i]);
  return tensors;
}

// Source, Given or Raw, says whether the formula makes its parameters of these.
template <typename S, template <typename> typename Source, typename Formula>
at::Tensor forward(const Formula& formula, const at::Tensor& x, at::TensorList numbers, std::optional<int64_t> axis) {
  const at::Tensor y = at::empty_like(x);
  const at::Tensor dense = channelwise::densified(x, y);
  const Parameters<Formula> parameters(numbers);
  elementwise::forward(Launch(), formula, Source<Formula>{parameters.given()}, channelwise::layout(dense, axis),
                       y.mutable_data_ptr<S>(), dense.const_data_ptr<S>(), x.numel());
  return y;
}

// The same of a list, in a few launches; `numbers` has a list for each number of a parameter.
template <typename S, template <typename> typename Source, typename Formula>
std::vector<at::Tensor> forward(const Formula& formula, at::TensorList xs, const std::vector<at::TensorList>& numbers,
                                std::optional<int64_t> axis) {
  std::vector<at::Tensor> ys;
  std::vector<at::Tensor> kept;  // until the kernels have been started
  std::vector<elementwise::ElementWise<S, Formula, Source<Formula>>> kernels;
  for (size_t i = 0; i < xs.size(); ++i) {
    const at::Tensor& y = ys.emplace_back(at::empty_like(xs[i]));
    if (y.numel() == 0) continue;
    const at::Tensor dense = channelwise::densified(xs[i], y);
    const Parameters<Formula> parameters(at_place(numbers, i));
    kernels.push_back(elementwise::kernel(formula, Source<Formula>{parameters.given()},
                                          channelwise::layout(dense, axis), y.mutable_data_ptr<S>(),
                                          dense.const_data_ptr<S>(), y.numel()));
    kept.push_back(dense);
    kept.insert(kept.end(), parameters.tensors.begin(), parameters.tensors.end());
  }
  launch_together(Launch(), kernels);
  return ys;
}

// What the backward of one x needs and makes.
template <typename S, typename Formula, typename Source>
struct Gradient {
  using T = typename Formula::value_type;
  using P = typename Formula::parameter_type;

  at::Tensor x;                     // its gradient
  std::vector<at::Tensor> numbers;  // those of its parameters, in their shapes
  Parameters<Formula> parameters;
  at::Tensor dense, dense_grad, partials;
  std::optional<sum_channels::Work<S, Formula, Source>> work;  // none without elements

  Gradient(const Formula& formula, const at::Tensor& grad, const at::Tensor& x_, at::TensorList numbers_,
           std::optional<int64_t> axis, double factor, int64_t most_blocks)
      : x(at::empty_like(x_)), parameters(numbers_) {
    Totals<T, P> totals{};
    for (size_t i = 0; i < numbers_.size(); ++i) {
      numbers.push_back(at::empty_like(numbers_[i], at::MemoryFormat::Contiguous));
      totals.numbers[i] = numbers[i].mutable_data_ptr<T>();
    }
    if (x.numel() == 0) {
      for (const at::Tensor& number : numbers) number.zero_();
      return;
    }
    dense = channelwise::densified(x_, x);
    dense_grad = channelwise::densified(grad, x);
    const auto layout = channelwise::layout(dense, axis);
    const auto part = sum_channels::partition<S>(layout, most_blocks);
    partials = at::empty({part.numel(), static_cast<int64_t>(numbers_.size())}, numbers[0].options());
    work.emplace(sum_channels::Work<S, Formula, Source>{{formula,
                                                         {parameters.given()},
                                                         layout,
                                                         x.mutable_data_ptr<S>(),
                                                         dense_grad.const_data_ptr<S>(),
                                                         dense.const_data_ptr<S>(),
                                                         x.numel()},
                                                        part,
                                                        reinterpret_cast<P*>(partials.mutable_data_ptr<T>()),
                                                        factor,
                                                        totals});
  }
};

// The gradients of x and, times `factor`, those of its parameters, for each of `numbers`.
template <typename S, template <typename> typename Source, typename Formula>
std::vector<at::Tensor> backward(const Formula& formula, const at::Tensor& grad, const at::Tensor& x,
                                 at::TensorList numbers, std::optional<int64_t> axis, double factor) {
  const Gradient<S, Formula, Source<Formula>> gradient(formula, grad, x, numbers, axis, factor, enough_blocks());
  if (gradient.work) sum_channels::backward(Launch(), *gradient.work);
  std::vector<at::Tensor> results{gradient.x};
  results.insert(results.end(), gradient.numbers.begin(), gradient.numbers.end());
  return results;
}

// The same of lists, in a few launches: a list of the gradients of x and one for each of `numbers`. No factors are all
// 1.
template <typename S, template <typename> typename Source, typename Formula>
std::vector<std::vector<at::Tensor>> backward(const Formula& formula, at::TensorList grads, at::TensorList xs,
                                              const std::vector<at::TensorList>& numbers, std::optional<int64_t> axis,
                                              at::ArrayRef<double> factors) {
  int64_t elements = 0;
  for (const at::Tensor& x : xs) elements += x.numel();
  std::vector<Gradient<S, Formula, Source<Formula>>> gradients;
  std::vector<sum_channels::Work<S, Formula, Source<Formula>>> works;
  std::vector<std::vector<at::Tensor>> results(1 + numbers.size());
  for (size_t i = 0; i < xs.size(); ++i) {
    // Together they fill the device.
    const int64_t blocks = ceil_div(enough_blocks() * xs[i].numel(), std::max<int64_t>(1, elements));
    const auto& gradient = gradients.emplace_back(formula, grads[i], xs[i], at_place(numbers, i), axis,
                                                  factors.empty() ? 1.0 : factors[i], blocks);
    if (gradient.work) works.push_back(*gradient.work);
    results[0].push_back(gradient.x);
    for (size_t k = 0; k < numbers.size(); ++k) results[1 + k].push_back(gradient.numbers[k]);
  }
  sum_channels::backward(Launch(), works);
  return results;
}

}  // namespace cctorch::cuda
