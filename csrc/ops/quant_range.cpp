#include "csrc/ops/quant_range.h"

#include <torch/library.h>

#include "csrc/ops/dispatch.h"
#include "csrc/ops/fake_quant.h"
#include "csrc/ops/learned_grid.h"

namespace cctorch {

at::Tensor quant_range(const at::Tensor& x, int64_t qmin, int64_t qmax, std::optional<int64_t> axis,
                       std::string_view method) {
  static const auto op = find_operator<decltype(quant_range)>("cctorch::quant_range");
  return op.call(x, qmin, qmax, axis, method);
}

std::tuple<at::Tensor, at::Tensor> quant_range_offset(const at::Tensor& x, int64_t qmin, int64_t qmax,
                                                      std::optional<int64_t> axis, std::string_view method) {
  static const auto op = find_operator<decltype(quant_range_offset)>("cctorch::quant_range_offset");
  return op.call(x, qmin, qmax, axis, method);
}

void observe_range_(at::Tensor& low, at::Tensor& high, const at::Tensor& x, double momentum,
                    std::optional<int64_t> axis) {
  static const auto op = find_operator<decltype(observe_range_)>("cctorch::observe_range_");
  op.call(low, high, x, momentum, axis);
}

std::optional<int64_t> check_quant_range(const char* op, const at::Tensor& x, int64_t qmin, int64_t qmax,
                                         std::optional<int64_t> axis, std::string_view method) {
  check_floating(x, op, "x");
  check_range(op, qmin, qmax);
  TORCH_CHECK(method == "minmax" || method == "mse", op, ": method must be minmax or mse, got ", method);
  if (axis) axis = check_axis(x, *axis, op, "x");
  return axis;
}

std::optional<int64_t> check_observe_range(const at::Tensor& low, const at::Tensor& high, const at::Tensor& x,
                                           double momentum, std::optional<int64_t> axis) {
  constexpr auto op = "observe_range_";
  TORCH_CHECK(0 <= momentum && momentum <= 1, op, ": momentum must be in [0, 1], got ", momentum);
  check_grid_parameter(op, x, high, "high", axis);
  return check_grid_parameter(op, x, low, "low", axis);
}

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("quant_range(Tensor x, int qmin, int qmax, int? axis=None, str method=\"minmax\") -> Tensor", tags);
  m.def("quant_range_offset(Tensor x, int qmin, int qmax, int? axis=None, str method=\"minmax\") -> (Tensor, Tensor)",
        tags);
  m.def("observe_range_(Tensor(a!) low, Tensor(b!) high, Tensor x, float momentum=0.1, int? axis=None) -> ()", tags);
}

}  // namespace cctorch
