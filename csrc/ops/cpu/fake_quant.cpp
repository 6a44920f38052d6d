#include "csrc/ops/fake_quant.h"

#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/cpu/learned_grid.h"
#include "csrc/ops/formula/fake_quant.h"

namespace cctorch::cpu {
namespace {

using learned_grid::with_math_type;

template <typename T>
formula::FakeQuant<T> lsq(int64_t qmin, int64_t qmax) {
  return {static_cast<T>(qmin), static_cast<T>(qmax)};
}

template <typename T>
formula::Pact<T> clipped(int64_t bits) {
  return {static_cast<T>((int64_t{1} << bits) - 1)};
}

at::Tensor fake_quant(const at::Tensor& x, const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                      std::optional<int64_t> axis, double) {
  axis = check_fake_quant(x, log_scale, qmin, qmax, axis);
  return with_math_type(
      x, [&](auto zero) { return learned_grid::forward(lsq<decltype(zero)>(qmin, qmax), x, axis, log_scale); });
}

std::tuple<at::Tensor, at::Tensor> fake_quant_backward(const at::Tensor& grad, const at::Tensor& x,
                                                       const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                                                       std::optional<int64_t> axis, double grad_scale) {
  axis = check_fake_quant(x, log_scale, qmin, qmax, axis);
  check_backward(grad, x, "fake_quant_backward");
  return with_math_type(x, [&](auto zero) {
    return learned_grid::backward(lsq<decltype(zero)>(qmin, qmax), grad, x, axis, grad_scale, log_scale);
  });
}

at::Tensor fake_quant_offset(const at::Tensor& x, const at::Tensor& log_scale, const at::Tensor& offset, int64_t qmin,
                             int64_t qmax, std::optional<int64_t> axis, double) {
  axis = check_fake_quant_offset(x, log_scale, offset, qmin, qmax, axis);
  return with_math_type(x, [&](auto zero) {
    using T = decltype(zero);
    return learned_grid::forward(formula::FakeQuantOffset<T>{lsq<T>(qmin, qmax)}, x, axis, log_scale, offset);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quant_offset_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                          const at::Tensor& log_scale,
                                                                          const at::Tensor& offset, int64_t qmin,
                                                                          int64_t qmax, std::optional<int64_t> axis,
                                                                          double grad_scale) {
  axis = check_fake_quant_offset(x, log_scale, offset, qmin, qmax, axis);
  check_backward(grad, x, "fake_quant_offset_backward");
  return with_math_type(x, [&](auto zero) {
    using T = decltype(zero);
    const formula::FakeQuantOffset<T> formula{lsq<T>(qmin, qmax)};
    return learned_grid::backward(formula, grad, x, axis, grad_scale, log_scale, offset);
  });
}

std::vector<at::Tensor> fake_quant_list(at::TensorList x, at::TensorList log_scale, int64_t qmin, int64_t qmax,
                                        std::optional<int64_t> axis, at::ArrayRef<double> grad_scale) {
  check_fake_quant(x, log_scale, qmin, qmax, axis, grad_scale);
  return with_math_type(
      x[0], [&](auto zero) { return learned_grid::forward(lsq<decltype(zero)>(qmin, qmax), x, axis, log_scale); });
}

Lists<2> fake_quant_list_backward(at::TensorList grad, at::TensorList x, at::TensorList log_scale, int64_t qmin,
                                  int64_t qmax, std::optional<int64_t> axis, at::ArrayRef<double> grad_scale) {
  check_fake_quant(x, log_scale, qmin, qmax, axis, grad_scale);
  check_backward(grad, x, "fake_quant_backward");
  return with_math_type(x[0], [&](auto zero) {
    return learned_grid::backward(lsq<decltype(zero)>(qmin, qmax), grad, x, axis, grad_scale, log_scale);
  });
}

std::vector<at::Tensor> fake_quant_offset_list(at::TensorList x, at::TensorList log_scale, at::TensorList offset,
                                               int64_t qmin, int64_t qmax, std::optional<int64_t> axis,
                                               at::ArrayRef<double> grad_scale) {
  check_fake_quant_offset(x, log_scale, offset, qmin, qmax, axis, grad_scale);
  return with_math_type(x[0], [&](auto zero) {
    using T = decltype(zero);
    return learned_grid::forward(formula::FakeQuantOffset<T>{lsq<T>(qmin, qmax)}, x, axis, log_scale, offset);
  });
}

Lists<3> fake_quant_offset_list_backward(at::TensorList grad, at::TensorList x, at::TensorList log_scale,
                                         at::TensorList offset, int64_t qmin, int64_t qmax, std::optional<int64_t> axis,
                                         at::ArrayRef<double> grad_scale) {
  check_fake_quant_offset(x, log_scale, offset, qmin, qmax, axis, grad_scale);
  check_backward(grad, x, "fake_quant_offset_backward");
  return with_math_type(x[0], [&](auto zero) {
    using T = decltype(zero);
    const formula::FakeQuantOffset<T> formula{lsq<T>(qmin, qmax)};
    return learned_grid::backward(formula, grad, x, axis, grad_scale, log_scale, offset);
  });
}

at::Tensor pact(const at::Tensor& x, const at::Tensor& log_alpha, int64_t bits, std::optional<int64_t> axis) {
  axis = check_pact(x, log_alpha, bits, axis);
  return with_math_type(
      x, [&](auto zero) { return learned_grid::forward(clipped<decltype(zero)>(bits), x, axis, log_alpha); });
}

std::tuple<at::Tensor, at::Tensor> pact_backward(const at::Tensor& grad, const at::Tensor& x,
                                                 const at::Tensor& log_alpha, int64_t bits,
                                                 std::optional<int64_t> axis) {
  axis = check_pact(x, log_alpha, bits, axis);
  check_backward(grad, x, "pact_backward");
  return with_math_type(x, [&](auto zero) {
    return learned_grid::backward(clipped<decltype(zero)>(bits), grad, x, axis, 1.0, log_alpha);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) {
  m.impl("fake_quant", &fake_quant);
  m.impl("fake_quant_backward", &fake_quant_backward);
  m.impl("fake_quant_offset", &fake_quant_offset);
  m.impl("fake_quant_offset_backward", &fake_quant_offset_backward);
  m.impl("fake_quant.list", &fake_quant_list);
  m.impl("fake_quant_backward.list", &fake_quant_list_backward);
  m.impl("fake_quant_offset.list", &fake_quant_offset_list);
  m.impl("fake_quant_offset_backward.list", &fake_quant_offset_list_backward);
  m.impl("pact", &pact);
  m.impl("pact_backward", &pact_backward);
}

}  // namespace cctorch::cpu
