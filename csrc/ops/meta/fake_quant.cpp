#include "csrc/ops/fake_quant.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/meta/lists.h"

namespace cctorch::meta {
namespace {

at::Tensor like_parameter(const at::Tensor& parameter) {
  return at::empty_like(parameter, at::MemoryFormat::Contiguous);
}

at::Tensor fake_quant(const at::Tensor& x, const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                      std::optional<int64_t> axis, double) {
  check_fake_quant(x, log_scale, qmin, qmax, axis);
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor> fake_quant_backward(const at::Tensor& grad, const at::Tensor& x,
                                                       const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                                                       std::optional<int64_t> axis, double) {
  check_fake_quant(x, log_scale, qmin, qmax, axis);
  check_backward(grad, x, "fake_quant_backward");
  return {at::empty_like(x), like_parameter(log_scale)};
}

at::Tensor fake_quant_offset(const at::Tensor& x, const at::Tensor& log_scale, const at::Tensor& offset, int64_t qmin,
                             int64_t qmax, std::optional<int64_t> axis, double) {
  check_fake_quant_offset(x, log_scale, offset, qmin, qmax, axis);
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quant_offset_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                          const at::Tensor& log_scale,
                                                                          const at::Tensor& offset, int64_t qmin,
                                                                          int64_t qmax, std::optional<int64_t> axis,
                                                                          double) {
  check_fake_quant_offset(x, log_scale, offset, qmin, qmax, axis);
  check_backward(grad, x, "fake_quant_offset_backward");
  return {at::empty_like(x), like_parameter(log_scale), like_parameter(offset)};
}

at::Tensor pact(const at::Tensor& x, const at::Tensor& log_alpha, int64_t bits, std::optional<int64_t> axis) {
  check_pact(x, log_alpha, bits, axis);
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor> pact_backward(const at::Tensor& grad, const at::Tensor& x,
                                                 const at::Tensor& log_alpha, int64_t bits,
                                                 std::optional<int64_t> axis) {
  check_pact(x, log_alpha, bits, axis);
  check_backward(grad, x, "pact_backward");
  return {at::empty_like(x), like_parameter(log_alpha)};
}

std::vector<at::Tensor> fake_quant_list(at::TensorList x, at::TensorList log_scale, int64_t qmin, int64_t qmax,
                                        std::optional<int64_t> axis, at::ArrayRef<double> grad_scale) {
  check_fake_quant(x, log_scale, qmin, qmax, axis, grad_scale);
  return empty_list_like(x);
}

Lists<2> fake_quant_list_backward(at::TensorList grad, at::TensorList x, at::TensorList log_scale, int64_t qmin,
                                  int64_t qmax, std::optional<int64_t> axis, at::ArrayRef<double> grad_scale) {
  check_fake_quant(x, log_scale, qmin, qmax, axis, grad_scale);
  check_backward(grad, x, "fake_quant_backward");
  return {empty_list_like(x), empty_parameters_like(log_scale)};
}

std::vector<at::Tensor> fake_quant_offset_list(at::TensorList x, at::TensorList log_scale, at::TensorList offset,
                                               int64_t qmin, int64_t qmax, std::optional<int64_t> axis,
                                               at::ArrayRef<double> grad_scale) {
  check_fake_quant_offset(x, log_scale, offset, qmin, qmax, axis, grad_scale);
  return empty_list_like(x);
}

Lists<3> fake_quant_offset_list_backward(at::TensorList grad, at::TensorList x, at::TensorList log_scale,
                                         at::TensorList offset, int64_t qmin, int64_t qmax, std::optional<int64_t> axis,
                                         at::ArrayRef<double> grad_scale) {
  check_fake_quant_offset(x, log_scale, offset, qmin, qmax, axis, grad_scale);
  check_backward(grad, x, "fake_quant_offset_backward");
  return {empty_list_like(x), empty_parameters_like(log_scale), empty_parameters_like(offset)};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Meta, m) {
  m.impl("fake_quant", &fake_quant);
  m.impl("fake_quant_backward", &fake_quant_backward);
  m.impl("fake_quant_offset", &fake_quant_offset);
  m.impl("fake_quant_offset_backward", &fake_quant_offset_backward);
  m.impl("pact", &pact);
  m.impl("pact_backward", &pact_backward);
  m.impl("fake_quant.list", &fake_quant_list);
  m.impl("fake_quant_backward.list", &fake_quant_list_backward);
  m.impl("fake_quant_offset.list", &fake_quant_offset_list);
  m.impl("fake_quant_offset_backward.list", &fake_quant_offset_list_backward);
}

TORCH_LIBRARY_IMPL(cctorch, CompositeExplicitAutograd, m) {
  m.impl("fake_quant.list", &WithoutTensors<&fake_quant_list>::call);
  m.impl("fake_quant_offset.list", &WithoutTensors<&fake_quant_offset_list>::call);
}

}  // namespace cctorch::meta
