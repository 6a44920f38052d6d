#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/float_quant.h"
#include "kernels/channelwise.cuh"
#include "kernels/weight_rows.cuh"

namespace cctorch::cuda {
namespace {

at::Tensor fp8_quant(const at::Tensor& x, const at::Tensor& log_scale, at::ScalarType dtype,
                     std::optional<int64_t> axis, double) {
  axis = check_fp8_quant(x, log_scale, dtype, axis);
  const c10::cuda::CUDAGuard guard(x.device());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "fp8_quant", [&] {
    return forward<scalar_t, Raw>(fp8<at::opmath_type<scalar_t>>(dtype), x, log_scale, axis);
  });
}

std::tuple<at::Tensor, at::Tensor> fp8_quant_backward(const at::Tensor& grad, const at::Tensor& x,
                                                      const at::Tensor& log_scale, at::ScalarType dtype,
                                                      std::optional<int64_t> axis, double grad_scale) {
  axis = check_fp8_quant(x, log_scale, dtype, axis);
  check_backward(grad, x, "fp8_quant_backward");
  const c10::cuda::CUDAGuard guard(x.device());
  const auto gradients =
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "fp8_quant_backward", [&] {
        return backward<scalar_t, Raw>(fp8<at::opmath_type<scalar_t>>(dtype), grad, x, log_scale, axis, grad_scale);
      });
  return {gradients[0], gradients[1]};
}

std::vector<at::Tensor> fp8_quant_list(at::TensorList x, at::TensorList log_scale, at::ScalarType dtype,
                                       std::optional<int64_t> axis, at::ArrayRef<double> grad_scale) {
  check_fp8_quant(x, log_scale, dtype, axis, grad_scale);
  const c10::cuda::CUDAGuard guard(x[0].device());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x[0].scalar_type(), "fp8_quant", [&] {
    return forward<scalar_t, Raw>(fp8<at::opmath_type<scalar_t>>(dtype), x, {log_scale}, axis);
  });
}

Lists<2> fp8_quant_list_backward(at::TensorList grad, at::TensorList x, at::TensorList log_scale, at::ScalarType dtype,
                                 std::optional<int64_t> axis, at::ArrayRef<double> grad_scale) {
  check_fp8_quant(x, log_scale, dtype, axis, grad_scale);
  check_backward(grad, x, "fp8_quant_backward");
  const c10::cuda::CUDAGuard guard(x[0].device());
  const auto gradients =
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x[0].scalar_type(), "fp8_quant_backward", [&] {
        return backward<scalar_t, Raw>(fp8<at::opmath_type<scalar_t>>(dtype), grad, x, {log_scale}, axis, grad_scale);
      });
  return {gradients[0], gradients[1]};
}

std::vector<at::Tensor> on_powers(at::TensorList xs, int64_t bits, std::optional<int64_t> axis) {
  const c10::cuda::CUDAGuard guard(xs[0].device());
  const WeightRows rows(xs, axis);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, xs[0].scalar_type(), "power_of_two_quant", [&] {
    using T = at::opmath_type<scalar_t>;
    rows.map(row_map::PowersOfTwo<scalar_t, T>{powers_of_two<T>(bits)});
  });
  return rows.results(xs);
}

at::Tensor on_long_rows(const at::Tensor& x, int64_t bits, std::optional<int64_t> axis) {
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor tops = top_powers(x, axis);
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "power_of_two_quant", [&] {
    return forward<scalar_t, Given>(powers_of_two<at::opmath_type<scalar_t>>(bits), x, tops, axis);
  });
}

at::Tensor power_of_two_quant(const at::Tensor& x, int64_t bits, std::optional<int64_t> axis) {
  axis = check_power_of_two_quant(x, bits, axis);
  return WeightRows::are_short(x, axis) ? on_powers(x, bits, axis).front() : on_long_rows(x, bits, axis);
}

std::vector<at::Tensor> power_of_two_quant_list(at::TensorList x, int64_t bits, std::optional<int64_t> axis) {
  check_power_of_two_quant(x, bits, axis);
  if (WeightRows::are_short(x, axis)) return on_powers(x, bits, axis);
  std::vector<at::Tensor> ys;
  for (const at::Tensor& one : x) ys.push_back(power_of_two_quant(one, bits, axis));
  return ys;
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CUDA, m) {
  m.impl("fp8_quant", &fp8_quant);
  m.impl("fp8_quant_backward", &fp8_quant_backward);
  m.impl("fp8_quant.list", &fp8_quant_list);
  m.impl("fp8_quant_backward.list", &fp8_quant_list_backward);
  m.impl("power_of_two_quant", &power_of_two_quant);
  m.impl("power_of_two_quant.list", &power_of_two_quant_list);
}

}  // namespace cctorch::cuda
