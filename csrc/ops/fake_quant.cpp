#include "csrc/ops/fake_quant.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"

namespace cctorch {

at::Tensor fake_quant(const at::Tensor& x, const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                      std::optional<int64_t> axis, double grad_scale) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::fake_quant", "").typed<decltype(fake_quant)>();
  return op.call(x, log_scale, qmin, qmax, axis, grad_scale);
}

std::tuple<at::Tensor, at::Tensor> fake_quant_backward(const at::Tensor& grad, const at::Tensor& x,
                                                       const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                                                       std::optional<int64_t> axis, double grad_scale) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cctorch::fake_quant_backward", "")
                             .typed<decltype(fake_quant_backward)>();
  return op.call(grad, x, log_scale, qmin, qmax, axis, grad_scale);
}

std::optional<int64_t> check_fake_quant(const at::Tensor& x, const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                                        std::optional<int64_t> axis) {
  constexpr auto op = "fake_quant";
  // Up to here a float holds every integer.
  constexpr int64_t limit = 1 << 24;
  check_floating(x, op, "x");
  const auto scale_type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(log_scale.scalar_type() == scale_type, op, ": log_scale must be ", scale_type, " for ", x.scalar_type(),
              " x, got ", log_scale.scalar_type(), "; convert it with log_scale.to(...)");
  check_same_device(x, op, "x", log_scale, "log_scale");
  TORCH_CHECK(-limit <= qmin && qmin < qmax && qmax <= limit, op,
              ": expected qmin < qmax, both within -2^24 to 2^24, got qmin = ", qmin, " and qmax = ", qmax);
  if (!axis) {
    TORCH_SYM_CHECK(log_scale.sym_numel().sym_eq(1), op,
                    ": log_scale must have one element where axis is not given, got ", "shape ", log_scale.sym_sizes(),
                    "; give axis for one scale per channel");
    return axis;
  }
  const int64_t positive = check_axis(x, *axis, op, "x");
  TORCH_CHECK(log_scale.dim() == 1, op, ": log_scale must be one-dimensional where axis is given, got shape ",
              log_scale.sym_sizes());
  TORCH_SYM_CHECK(log_scale.sym_size(0).sym_eq(x.sym_size(positive)), op,
                  ": log_scale must have one element for each of ", "the ", x.sym_size(positive), " indices of axis ",
                  *axis, ", got ", log_scale.sym_size(0));
  return positive;
}

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  m.def("fake_quant(Tensor x, Tensor log_scale, int qmin, int qmax, int? axis=None, float grad_scale=1.0) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "fake_quant_backward(Tensor grad, Tensor x, Tensor log_scale, int qmin, int qmax, int? axis, float grad_scale) "
      "-> "
      "(Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

}  // namespace cctorch
