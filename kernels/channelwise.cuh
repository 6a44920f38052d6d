#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <optional>
#include <tuple>
#include <vector>

#include "csrc/ops/channelwise.h"
#include "kernels/elementwise.cuh"
#include "kernels/launch.cuh"
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

// The gradient of x, and `factor` times that of the parameters, channels x numbers.
template <typename S, template <typename> typename Source, typename Formula>
std::tuple<at::Tensor, at::Tensor> backward(const Formula& formula, const at::Tensor& grad, const at::Tensor& x,
                                            at::TensorList numbers, std::optional<int64_t> axis, double factor) {
  using T = typename Formula::value_type;
  using P = typename Formula::parameter_type;
  const Parameters<Formula> parameters(numbers);
  const auto options = numbers[0].options();
  const auto per_channel = static_cast<int64_t>(numbers.size());
  const at::Tensor grad_x = at::empty_like(x);
  const at::Tensor sums = at::empty({numbers[0].numel(), per_channel}, options);
  if (x.numel() == 0) return {grad_x, sums.zero_()};
  const at::Tensor dense = channelwise::densified(x, grad_x);
  const at::Tensor dense_grad = channelwise::densified(grad, grad_x);
  const auto layout = channelwise::layout(dense, axis);
  const auto partition = sum_channels::partition<S>(layout, enough_blocks());
  const auto& part = partition.partials;
  const at::Tensor partials = at::empty({part.outer, part.channels, part.inner, per_channel}, options);
  const sum_channels::Arguments<S, Formula, Source<Formula>> arguments{formula,
                                                                       {parameters.given()},
                                                                       layout,
                                                                       grad_x.mutable_data_ptr<S>(),
                                                                       dense_grad.const_data_ptr<S>(),
                                                                       dense.const_data_ptr<S>(),
                                                                       x.numel()};
  sum_channels::backward(Launch(), arguments, partition, reinterpret_cast<P*>(partials.mutable_data_ptr<T>()), factor,
                         reinterpret_cast<P*>(sums.mutable_data_ptr<T>()));
  return {grad_x, sums};
}

}  // namespace cctorch::cuda
