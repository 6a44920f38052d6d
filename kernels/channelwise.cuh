#pragma once

#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/native/cuda/Loops.cuh>

#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "csrc/ops/channelwise.h"
#include "kernels/launch.cuh"
#include "kernels/sum_channels.cuh"

// Element-wise formulas with one parameter per channel, or two; they are of the formula's type.
namespace cctorch::cuda {

// [C] as [1, ..., C, ..., 1] with C at `axis`; a single parameter broadcasts as it is.
inline at::Tensor broadcast_view(const at::Tensor& parameters, const at::Tensor& x, std::optional<int64_t> axis) {
  std::vector<int64_t> shape(x.dim(), 1);
  if (axis) shape[*axis] = x.size(*axis);
  return parameters.reshape(shape);
}

inline at::TensorIterator iterator(std::initializer_list<at::Tensor> outputs,
                                   std::initializer_list<at::Tensor> inputs) {
  at::TensorIteratorConfig config;
  config.check_all_same_dtype(false).resize_outputs(false);
  for (const auto& output : outputs) config.add_owned_output(output);
  for (const auto& input : inputs) config.add_owned_const_input(input);
  return config.build();
}

// `parameters` broadcast against x.
template <typename S, typename Formula>
at::Tensor forward(const Formula& formula, const at::Tensor& x, const at::Tensor& parameters) {
  using T = typename Formula::value_type;
  const at::Tensor y = at::empty_like(x);
  auto iter = iterator({y}, {x, parameters});
  at::native::gpu_kernel(iter, [formula] GPU_LAMBDA(S x, T parameter) -> S {
    return static_cast<S>(formula.forward(static_cast<T>(x), parameter));
  });
  return y;
}

// The same with two parameters.
template <typename S, typename Formula>
at::Tensor forward(const Formula& formula, const at::Tensor& x, const at::Tensor& first, const at::Tensor& second) {
  using T = typename Formula::value_type;
  const at::Tensor y = at::empty_like(x);
  auto iter = iterator({y}, {x, first, second});
  at::native::gpu_kernel(iter, [formula] GPU_LAMBDA(S x, T first, T second) -> S {
    return static_cast<S>(formula.forward(static_cast<T>(x), {first, second}));
  });
  return y;
}

// The gradient of x, and `factor` times that of the parameters: channels, or channels x 2 where there are two.
template <typename S, typename Formula>
std::tuple<at::Tensor, at::Tensor> backward(const Formula& formula, const at::Tensor& grad, const at::Tensor& x,
                                            const at::Tensor& parameters, std::optional<int64_t> axis, double factor) {
  using T = typename Formula::value_type;
  using P = typename Formula::parameter_type;
  constexpr auto numbers = static_cast<int64_t>(sizeof(P) / sizeof(T));
  const at::Tensor grad_x = at::empty_like(x);
  const at::Tensor sums = at::empty(parameters.sizes(), parameters.options());
  if (x.numel() == 0) return {grad_x, sums.zero_()};
  const at::Tensor dense = channelwise::densified(x, grad_x);
  const at::Tensor dense_grad = channelwise::densified(grad, grad_x);
  const at::Tensor dense_parameters = parameters.contiguous();
  const auto layout = channelwise::layout(dense, axis);
  const auto partition = sum_channels::partition(layout, enough_blocks());
  const auto& part = partition.partials;
  const at::Tensor partials = at::empty({part.outer, part.channels, part.inner, numbers}, parameters.options());
  const sum_channels::Arguments<S, Formula> arguments{formula,
                                                      layout,
                                                      grad_x.mutable_data_ptr<S>(),
                                                      dense_grad.const_data_ptr<S>(),
                                                      dense.const_data_ptr<S>(),
                                                      reinterpret_cast<const P*>(dense_parameters.const_data_ptr<T>())};
  sum_channels::backward(Launch(), arguments, partition, reinterpret_cast<P*>(partials.mutable_data_ptr<T>()), factor,
                         reinterpret_cast<P*>(sums.mutable_data_ptr<T>()));
  return {grad_x, sums};
}

}  // namespace cctorch::cuda
