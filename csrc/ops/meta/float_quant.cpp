#include "csrc/ops/float_quant.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"

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

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Meta, m) {
  m.impl("fp8_quant", &fp8_quant);
  m.impl("fp8_quant_backward", &fp8_quant_backward);
  m.impl("power_of_two_quant", &power_of_two_quant);
}

}  // namespace cctorch::meta
