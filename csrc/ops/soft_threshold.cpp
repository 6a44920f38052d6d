#include "csrc/ops/soft_threshold.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/rows.h"

namespace cctorch {

at::Tensor soft_threshold(const at::Tensor& x, const at::Tensor& threshold, std::optional<int64_t> axis) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::soft_threshold", "").typed<decltype(soft_threshold)>();
  return op.call(x, threshold, axis);
}

std::tuple<at::Tensor, at::Tensor> soft_threshold_backward(const at::Tensor& grad, const at::Tensor& x,
                                                           const at::Tensor& threshold, std::optional<int64_t> axis) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cctorch::soft_threshold_backward", "")
                             .typed<decltype(soft_threshold_backward)>();
  return op.call(grad, x, threshold, axis);
}

std::optional<int64_t> check_soft_threshold(const at::Tensor& x, const at::Tensor& threshold,
                                            std::optional<int64_t> axis) {
  constexpr auto op = "soft_threshold";
  check_floating(x, op, "x");
  const auto type = math_type(x);
  TORCH_CHECK(threshold.scalar_type() == type, op, ": threshold must be ", type, " for ", x.scalar_type(), " x, got ",
              threshold.scalar_type(), "; convert it with threshold.to(...)");
  check_same_device(x, op, "x", threshold, "threshold");
  if (!axis) {
    TORCH_SYM_CHECK(threshold.sym_numel().sym_eq(1), op,
                    ": threshold must have one element where axis is not given, got shape ", threshold.sym_sizes(),
                    "; give axis for one threshold per channel");
    return axis;
  }
  const int64_t positive = check_axis(x, *axis, op, "x");
  TORCH_CHECK(threshold.dim() == 1, op, ": threshold must be one-dimensional where axis is given, got shape ",
              threshold.sym_sizes());
  TORCH_SYM_CHECK(threshold.sym_size(0).sym_eq(x.sym_size(positive)), op,
                  ": threshold must have one element for each of the ", x.sym_size(positive), " indices of axis ",
                  *axis, ", got ", threshold.sym_size(0));
  return positive;
}

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  m.def("soft_threshold(Tensor x, Tensor threshold, int? axis=None) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("soft_threshold_backward(Tensor grad, Tensor x, Tensor threshold, int? axis) -> (Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
}

}  // namespace cctorch
