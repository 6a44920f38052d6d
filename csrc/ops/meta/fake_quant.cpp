#include "csrc/ops/fake_quant.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"

namespace cctorch::meta {
namespace {

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
  return {at::empty_like(x), at::empty_like(log_scale)};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Meta, m) {
  m.impl("fake_quant", &fake_quant);
  m.impl("fake_quant_backward", &fake_quant_backward);
}

}  // namespace cctorch::meta
