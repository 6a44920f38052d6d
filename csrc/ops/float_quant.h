#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/float_quant.h>

#include <tuple>

#include "csrc/ops/dispatch.h"
#include "csrc/ops/formula/float_quant.h"

namespace cctorch {

using Fp8QuantOp = at::Tensor(const at::Tensor&, const at::Tensor&, at::ScalarType, std::optional<int64_t>, double);
using Fp8QuantListOp = std::vector<at::Tensor>(at::TensorList, at::TensorList, at::ScalarType, std::optional<int64_t>,
                                               at::ArrayRef<double>);

using PowerOfTwoQuantOp = at::Tensor(const at::Tensor&, int64_t, std::optional<int64_t>);
using PowerOfTwoQuantListOp = std::vector<at::Tensor>(at::TensorList, int64_t, std::optional<int64_t>);

std::tuple<at::Tensor, at::Tensor> fp8_quant_backward(const at::Tensor& grad, const at::Tensor& x,
                                                      const at::Tensor& log_scale, at::ScalarType dtype,
                                                      std::optional<int64_t> axis, double grad_scale);

Lists<2> fp8_quant_list_backward(at::TensorList grad, at::TensorList x, at::TensorList log_scale, at::ScalarType dtype,
                                 std::optional<int64_t> axis, at::ArrayRef<double> grad_scale);

// These raise where an argument is wrong and return the axis counted from the front.
std::optional<int64_t> check_fp8_quant(const at::Tensor& x, const at::Tensor& log_scale, at::ScalarType dtype,
                                       std::optional<int64_t> axis);
void check_fp8_quant(at::TensorList x, at::TensorList log_scale, at::ScalarType dtype, std::optional<int64_t> axis,
                     at::ArrayRef<double> grad_scale);
std::optional<int64_t> check_power_of_two_quant(const at::Tensor& x, int64_t bits, std::optional<int64_t> axis);
void check_power_of_two_quant(at::TensorList x, int64_t bits, std::optional<int64_t> axis);

template <typename T>
formula::FloatQuant<T> fp8(at::ScalarType dtype) {
  return dtype == at::kFloat8_e5m2 ? formula::FloatQuant<T>{T(57344), T(0x1p-14), T(0x1p-2)}
                                   : formula::FloatQuant<T>{T(448), T(0x1p-6), T(0x1p-3)};
}

// 1, 1/2, 1/4, ..., 2^(bits-1) - 1 of them, and 0
template <typename T>
formula::FloatQuant<T> powers_of_two(int64_t bits) {
  const T smallest = std::ldexp(T(1), static_cast<int>(2 - (int64_t{1} << (bits - 1))));
  return {T(1), smallest, T(1)};
}

// INQ's largest power of two of x, or of each index of `axis`, in the type of x's arithmetic.
at::Tensor top_powers(const at::Tensor& x, std::optional<int64_t> axis);

}  // namespace cctorch
