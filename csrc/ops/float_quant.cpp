#include "csrc/ops/float_quant.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/frexp.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include "csrc/ops/dispatch.h"
#include "csrc/ops/learned_grid.h"
#include "csrc/ops/rows.h"

namespace cctorch {

at::Tensor fp8_quant(const at::Tensor& x, const at::Tensor& log_scale, at::ScalarType dtype,
                     std::optional<int64_t> axis, double grad_scale) {
  static const auto op = find_operator<Fp8QuantOp>("cctorch::fp8_quant");
  return op.call(x, log_scale, dtype, axis, grad_scale);
}

std::tuple<at::Tensor, at::Tensor> fp8_quant_backward(const at::Tensor& grad, const at::Tensor& x,
                                                      const at::Tensor& log_scale, at::ScalarType dtype,
                                                      std::optional<int64_t> axis, double grad_scale) {
  static const auto op = find_operator<decltype(fp8_quant_backward)>("cctorch::fp8_quant_backward");
  return op.call(grad, x, log_scale, dtype, axis, grad_scale);
}

std::vector<at::Tensor> fp8_quant(at::TensorList x, at::TensorList log_scale, at::ScalarType dtype,
                                  std::optional<int64_t> axis, at::ArrayRef<double> grad_scale) {
  static const auto op = find_operator<Fp8QuantListOp>("cctorch::fp8_quant", "list");
  return op.call(x, log_scale, dtype, axis, grad_scale);
}

Lists<2> fp8_quant_list_backward(at::TensorList grad, at::TensorList x, at::TensorList log_scale, at::ScalarType dtype,
                                 std::optional<int64_t> axis, at::ArrayRef<double> grad_scale) {
  static const auto op = find_operator<decltype(fp8_quant_list_backward)>("cctorch::fp8_quant_backward", "list");
  return op.call(grad, x, log_scale, dtype, axis, grad_scale);
}

at::Tensor power_of_two_quant(const at::Tensor& x, int64_t bits, std::optional<int64_t> axis) {
  static const auto op = find_operator<PowerOfTwoQuantOp>("cctorch::power_of_two_quant");
  return op.call(x, bits, axis);
}

std::vector<at::Tensor> power_of_two_quant(at::TensorList x, int64_t bits, std::optional<int64_t> axis) {
  static const auto op = find_operator<PowerOfTwoQuantListOp>("cctorch::power_of_two_quant", "list");
  return op.call(x, bits, axis);
}

namespace {

void check_format(at::ScalarType dtype) {
  TORCH_CHECK(dtype == at::kFloat8_e4m3fn || dtype == at::kFloat8_e5m2,
              "fp8_quant: dtype must be float8_e4m3fn or float8_e5m2, got ", dtype);
}

void check_bits(int64_t bits) {
  TORCH_CHECK(2 <= bits && bits <= 7, "power_of_two_quant: bits must be in [2, 7], got ", bits);
}

}  // namespace

std::optional<int64_t> check_fp8_quant(const at::Tensor& x, const at::Tensor& log_scale, at::ScalarType dtype,
                                       std::optional<int64_t> axis) {
  check_format(dtype);
  return check_grid_parameter("fp8_quant", x, log_scale, "log_scale", axis);
}

void check_fp8_quant(at::TensorList x, at::TensorList log_scale, at::ScalarType dtype, std::optional<int64_t> axis,
                     at::ArrayRef<double> grad_scale) {
  check_format(dtype);
  check_grid_parameters("fp8_quant", x, log_scale, "log_scale", axis);
  check_grad_scales("fp8_quant", x, grad_scale);
}

std::optional<int64_t> check_power_of_two_quant(const at::Tensor& x, int64_t bits, std::optional<int64_t> axis) {
  check_bits(bits);
  check_floating(x, "power_of_two_quant", "x");
  if (axis) axis = check_axis(x, *axis, "power_of_two_quant", "x");
  return axis;
}

void check_power_of_two_quant(at::TensorList x, int64_t bits, std::optional<int64_t> axis) {
  check_bits(bits);
  check_like_tensors(x, "power_of_two_quant", "x");
  check_axes(x, axis, "power_of_two_quant");
}

at::Tensor top_powers(const at::Tensor& x, std::optional<int64_t> axis) {
  const at::Tensor largest = at::amax(as_rows(x, axis).abs(), -1).to(math_type(x));
  const double limit = x.scalar_type() == at::kDouble ? 0x1p1023 : 0x1p127;
  // largest = fraction * 2^exponent with a fraction from 1/2 to 1; 4/3 of it reaches 2^exponent from 3/4 on.
  const at::Tensor fraction = std::get<0>(at::frexp(largest));
  const at::Tensor below = largest / (2 * fraction);
  const at::Tensor top = at::where(fraction >= 0.75, (2 * below).clamp_max(limit), below);
  // Neither a channel of zeros nor one with an infinity or NaN has a largest power.
  return at::where((largest > 0).logical_and(largest.isfinite()), top, 1.0);
}

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "fp8_quant(Tensor x, Tensor log_scale, ScalarType dtype, int? axis=None, float grad_scale=1.0) "
      "-> Tensor",
      tags);
  m.def(
      "fp8_quant_backward(Tensor grad, Tensor x, Tensor log_scale, ScalarType dtype, int? axis, float grad_scale) -> "
      "(Tensor, Tensor)",
      tags);
  m.def(
      "fp8_quant.list(Tensor[] x, Tensor[] log_scale, ScalarType dtype, int? axis=None, float[] grad_scale=[]) -> "
      "Tensor[]",
      tags);
  m.def(
      "fp8_quant_backward.list(Tensor[] grad, Tensor[] x, Tensor[] log_scale, ScalarType dtype, int? axis, "
      "float[] grad_scale) -> (Tensor[], Tensor[])",
      tags);
  m.def("power_of_two_quant(Tensor x, int bits, int? axis=None) -> Tensor", tags);
  m.def("power_of_two_quant.list(Tensor[] x, int bits, int? axis=None) -> Tensor[]", tags);
}

namespace composite {
namespace {

std::vector<at::Tensor> power_of_two_quant(at::TensorList x, int64_t bits, std::optional<int64_t> axis) {
  check_power_of_two_quant(x, bits, axis);
  return map_rows(x, axis, [&](const at::Tensor& rows) { return cctorch::power_of_two_quant(rows, bits, 0); });
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CompositeExplicitAutograd, m) { m.impl("power_of_two_quant.list", &power_of_two_quant); }

}  // namespace composite

}  // namespace cctorch
