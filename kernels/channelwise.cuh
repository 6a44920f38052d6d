#pragma once

#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/native/cuda/Loops.cuh>

#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

// Element-wise formulas with one parameter per channel. `parameters` is of the formula's type and broadcasts against x.
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

// The gradient of x, and of the parameters in their own shape.
template <typename S, typename Formula>
std::tuple<at::Tensor, at::Tensor> backward(const Formula& formula, const at::Tensor& grad, const at::Tensor& x,
                                            const at::Tensor& parameters) {
  using T = typename Formula::value_type;
  const at::Tensor grad_x = at::empty_like(x);
  const at::Tensor contributions = at::empty_like(x, parameters.options());
  auto iter = iterator({grad_x, contributions}, {grad, x, parameters});
  at::native::gpu_kernel_multiple_outputs(iter, [formula] GPU_LAMBDA(S grad, S x, T parameter) -> thrust::tuple<S, T> {
    const auto gradients = formula.backward(static_cast<T>(grad), static_cast<T>(x), parameter);
    return {static_cast<S>(gradients.x), gradients.parameter};
  });
  std::vector<int64_t> reduced;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (parameters.size(d) == 1) reduced.push_back(d);
  }
  return {grad_x, reduced.empty() ? contributions : contributions.sum(reduced, /*keepdim=*/true)};
}

}  // namespace cctorch::cuda
