#include "csrc/ops/float_quant.h"

#include <torch/library.h>

#include "csrc/ops/checks.h"
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

at::Tensor power_of_two_quant(const at::Tensor& x, int64_t bits, std::optional<int64_t> axis) {
  axis = check_power_of_two_quant(x, bits, axis);
  if (x.numel() == 0) return at::empty_like(x);
  const at::Tensor y = at::empty_like(x), tops = top_powers(x, axis), dense = channelwise::densified(x, y);
  with_math_type(x, [&](auto zero) {
    using T = decltype(zero);
    const T* values = tops.const_data_ptr<T>();
    channelwise::forward(powers_of_two<T>(bits),
                         {{channelwise::layout(dense, axis), y, dense, {values, values + tops.numel()}, {}}});
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) {
  m.impl("fp8_quant", &fp8_quant);
  m.impl("fp8_quant_backward", &fp8_quant_backward);
  m.impl("fp8_quant.list", &fp8_quant_list);
  m.impl("fp8_quant_backward.list", &fp8_quant_list_backward);
  m.impl("power_of_two_quant", &power_of_two_quant);
}

}  // namespace cctorch::cpu
