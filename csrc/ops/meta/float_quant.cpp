#include "csrc/ops/float_quant.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/meta/lists.h"

namespace cctorch::meta {
namespace {

at::Tensor fp8_quant(const at::Tensor& x, const at::Tensor& log_scale, at::ScalarType dtype,
                     std::optional<int64_t> axis, double) {
  check_fp8_quant(x, log_scale, dtype, axis);
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor> fp8_quant_backward(const at::Tensor& grad, const at::Tensor& x,
                                                      const at::Tensor& log_scale, at::ScalarType dtype,
                                                      std::optional<int64_t> axis, double) {
  check_fp8_quant(x, log_scale, dtype, axis);
  check_backward(grad, x, "fp8_quant_backward");
  return {at::empty_like(x), at::empty_like(log_scale, at::MemoryFormat::Contiguous)};
}

at::Tensor power_of_two_quant(const at::Tensor& x, int64_t bits, std::optional<int64_t> axis) {
  check_power_of_two_quant(x, bits, axis);
  return at::empty_like(x);
}

std::vector<at::Tensor> fp8_quant_list(at::TensorList x, at::TensorList log_scale, at::ScalarType dtype,
                                       std::optional<int64_t> axis, at::ArrayRef<double> grad_scale) {
  check_fp8_quant(x, log_scale, dtype, axis, grad_scale);
  return empty_list_like(x);
}

Lists<2> fp8_quant_list_backward(at::TensorList grad, at::TensorList x, at::TensorList log_scale, at::ScalarType dtype,
                                 std::optional<int64_t> axis, at::ArrayRef<double> grad_scale) {
  check_fp8_quant(x, log_scale, dtype, axis, grad_scale);
  check_backward(grad, x, "fp8_quant_backward");
  return {empty_list_like(x), empty_parameters_like(log_scale)};
}

std::vector<at::Tensor> power_of_two_quant_list(at::TensorList x, int64_t bits, std::optional<int64_t> axis) {
  check_power_of_two_quant(x, bits, axis);
  return empty_list_like(x);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Meta, m) {
  m.impl("fp8_quant", &fp8_quant);
  m.impl("fp8_quant_backward", &fp8_quant_backward);
  m.impl("power_of_two_quant", &power_of_two_quant);
  m.impl("power_of_two_quant.list", &power_of_two_quant_list);
  m.impl("fp8_quant.list", &fp8_quant_list);
  m.impl("fp8_quant_backward.list", &fp8_quant_list_backward);
}

TORCH_LIBRARY_IMPL(cctorch, CompositeExplicitAutograd, m) {
  m.impl("fp8_quant.list", &WithoutTensors<&fp8_quant_list>::call);
}

}  // namespace cctorch::meta
