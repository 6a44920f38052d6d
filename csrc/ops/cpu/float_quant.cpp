#include "csrc/ops/float_quant.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <bit>
#include <cmath>
#include <limits>

#include "csrc/ops/checks.h"
#include "csrc/ops/cpu/fitted_rows.h"
#include "csrc/ops/cpu/largest.h"
#include "csrc/ops/cpu/learned_grid.h"

namespace cctorch::cpu {
namespace {

using learned_grid::with_math_type;

at::Tensor fp8_quant(const at::Tensor& x, const at::Tensor& log_scale, at::ScalarType dtype,
                     std::optional<int64_t> axis, double) {
  axis = check_fp8_quant(x, log_scale, dtype, axis);
  return with_math_type(
      x, [&](auto zero) { return learned_grid::forward(fp8<decltype(zero)>(dtype), x, axis, log_scale); });
}

std::tuple<at::Tensor, at::Tensor> fp8_quant_backward(const at::Tensor& grad, const at::Tensor& x,
                                                      const at::Tensor& log_scale, at::ScalarType dtype,
                                                      std::optional<int64_t> axis, double grad_scale) {
  axis = check_fp8_quant(x, log_scale, dtype, axis);
  check_backward(grad, x, "fp8_quant_backward");
  return with_math_type(x, [&](auto zero) {
    return learned_grid::backward(fp8<decltype(zero)>(dtype), grad, x, axis, grad_scale, log_scale);
  });
}

std::vector<at::Tensor> fp8_quant_list(at::TensorList x, at::TensorList log_scale, at::ScalarType dtype,
                                       std::optional<int64_t> axis, at::ArrayRef<double> grad_scale) {
  check_fp8_quant(x, log_scale, dtype, axis, grad_scale);
  return with_math_type(
      x[0], [&](auto zero) { return learned_grid::forward(fp8<decltype(zero)>(dtype), x, axis, log_scale); });
}

Lists<2> fp8_quant_list_backward(at::TensorList grad, at::TensorList x, at::TensorList log_scale, at::ScalarType dtype,
                                 std::optional<int64_t> axis, at::ArrayRef<double> grad_scale) {
  check_fp8_quant(x, log_scale, dtype, axis, grad_scale);
  check_backward(grad, x, "fp8_quant_backward");
  return with_math_type(x[0], [&](auto zero) {
    return learned_grid::backward(fp8<decltype(zero)>(dtype), grad, x, axis, grad_scale, log_scale);
  });
}

std::vector<at::Tensor> on_powers(at::TensorList x, int64_t bits, std::optional<int64_t> axis) {
  const auto rows = rows_of(x, axis);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x[0].scalar_type(), "power_of_two_quant", [&] {
    using T = at::opmath_type<scalar_t>;
    using Bits = formula::BitsOf<scalar_t>;
    struct Nothing {};
    const auto formula = powers_of_two<T>(bits);
    const auto loops = channelwise::loops<formula::FloatQuant<T>>(x[0].scalar_type());
    fit_rows<scalar_t, Nothing>(
        rows,
        [](Nothing&, size_t, int64_t, const scalar_t* from, int64_t size) {
          // NaN is larger than any number here.
          const Bits bits_of_largest =
              largest_magnitude(reinterpret_cast<const Bits*>(from), size, static_cast<Bits>(~Bits(0)));
          return formula::top_power(static_cast<T>(std::bit_cast<scalar_t>(bits_of_largest)));
        },
        [&](const Nothing&, T top, scalar_t* to, const scalar_t* from, int64_t, int64_t size, simd::Stores stores) {
          loops.forward(formula, to, from, size, top, stores);
        });
  });
  return results_of(rows, x);
}

at::Tensor power_of_two_quant(const at::Tensor& x, int64_t bits, std::optional<int64_t> axis) {
  return on_powers(x, bits, check_power_of_two_quant(x, bits, axis)).front();
}

std::vector<at::Tensor> power_of_two_quant_list(at::TensorList x, int64_t bits, std::optional<int64_t> axis) {
  check_power_of_two_quant(x, bits, axis);
  return on_powers(x, bits, axis);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) {
  m.impl("fp8_quant", &fp8_quant);
  m.impl("fp8_quant_backward", &fp8_quant_backward);
  m.impl("fp8_quant.list", &fp8_quant_list);
  m.impl("fp8_quant_backward.list", &fp8_quant_list_backward);
  m.impl("power_of_two_quant", &power_of_two_quant);
  m.impl("power_of_two_quant.list", &power_of_two_quant_list);
}

}  // namespace cctorch::cpu
