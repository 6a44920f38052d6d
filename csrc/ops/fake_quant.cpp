#include "csrc/ops/fake_quant.h"

#include <torch/library.h>

#include "csrc/ops/dispatch.h"
#include "csrc/ops/learned_grid.h"

namespace cctorch {

at::Tensor fake_quant(const at::Tensor& x, const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                      std::optional<int64_t> axis, double grad_scale) {
  static const auto op = find_operator<FakeQuantOp>("cctorch::fake_quant");
  return op.call(x, log_scale, qmin, qmax, axis, grad_scale);
}

std::tuple<at::Tensor, at::Tensor> fake_quant_backward(const at::Tensor& grad, const at::Tensor& x,
                                                       const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                                                       std::optional<int64_t> axis, double grad_scale) {
  static const auto op = find_operator<decltype(fake_quant_backward)>("cctorch::fake_quant_backward");
  return op.call(grad, x, log_scale, qmin, qmax, axis, grad_scale);
}

at::Tensor fake_quant_offset(const at::Tensor& x, const at::Tensor& log_scale, const at::Tensor& offset, int64_t qmin,
                             int64_t qmax, std::optional<int64_t> axis, double grad_scale) {
  static const auto op = find_operator<FakeQuantOffsetOp>("cctorch::fake_quant_offset");
  return op.call(x, log_scale, offset, qmin, qmax, axis, grad_scale);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quant_offset_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                          const at::Tensor& log_scale,
                                                                          const at::Tensor& offset, int64_t qmin,
                                                                          int64_t qmax, std::optional<int64_t> axis,
                                                                          double grad_scale) {
  static const auto op = find_operator<decltype(fake_quant_offset_backward)>("cctorch::fake_quant_offset_backward");
  return op.call(grad, x, log_scale, offset, qmin, qmax, axis, grad_scale);
}

std::vector<at::Tensor> fake_quant(at::TensorList x, at::TensorList log_scale, int64_t qmin, int64_t qmax,
                                   std::optional<int64_t> axis, at::ArrayRef<double> grad_scale) {
  static const auto op = find_operator<FakeQuantListOp>("cctorch::fake_quant", "list");
  return op.call(x, log_scale, qmin, qmax, axis, grad_scale);
}

Lists<2> fake_quant_list_backward(at::TensorList grad, at::TensorList x, at::TensorList log_scale, int64_t qmin,
                                  int64_t qmax, std::optional<int64_t> axis, at::ArrayRef<double> grad_scale) {
  static const auto op = find_operator<decltype(fake_quant_list_backward)>("cctorch::fake_quant_backward", "list");
  return op.call(grad, x, log_scale, qmin, qmax, axis, grad_scale);
}

std::vector<at::Tensor> fake_quant_offset(at::TensorList x, at::TensorList log_scale, at::TensorList offset,
                                          int64_t qmin, int64_t qmax, std::optional<int64_t> axis,
                                          at::ArrayRef<double> grad_scale) {
  static const auto op = find_operator<FakeQuantOffsetListOp>("cctorch::fake_quant_offset", "list");
  return op.call(x, log_scale, offset, qmin, qmax, axis, grad_scale);
}

Lists<3> fake_quant_offset_list_backward(at::TensorList grad, at::TensorList x, at::TensorList log_scale,
                                         at::TensorList offset, int64_t qmin, int64_t qmax, std::optional<int64_t> axis,
                                         at::ArrayRef<double> grad_scale) {
  static const auto op =
      find_operator<decltype(fake_quant_offset_list_backward)>("cctorch::fake_quant_offset_backward", "list");
  return op.call(grad, x, log_scale, offset, qmin, qmax, axis, grad_scale);
}

at::Tensor fake_quant_groups(const at::Tensor& x, const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                             int64_t group_size, double grad_scale, const std::optional<at::Tensor>& offset) {
  static const auto op = find_operator<decltype(fake_quant_groups)>("cctorch::fake_quant_groups");
  return op.call(x, log_scale, qmin, qmax, group_size, grad_scale, offset);
}

at::Tensor pact(const at::Tensor& x, const at::Tensor& log_alpha, int64_t bits, std::optional<int64_t> axis) {
  static const auto op = find_operator<decltype(pact)>("cctorch::pact");
  return op.call(x, log_alpha, bits, axis);
}

std::tuple<at::Tensor, at::Tensor> pact_backward(const at::Tensor& grad, const at::Tensor& x,
                                                 const at::Tensor& log_alpha, int64_t bits,
                                                 std::optional<int64_t> axis) {
  static const auto op = find_operator<decltype(pact_backward)>("cctorch::pact_backward");
  return op.call(grad, x, log_alpha, bits, axis);
}

void check_range(const char* op, int64_t qmin, int64_t qmax) {
  // Up to here a float holds every integer.
  constexpr int64_t limit = 1 << 24;
  TORCH_CHECK(-limit <= qmin && qmin < qmax && qmax <= limit, op,
              ": expected qmin < qmax, both within -2^24 to 2^24, got qmin = ", qmin, " and qmax = ", qmax);
}

std::optional<int64_t> check_fake_quant(const at::Tensor& x, const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                                        std::optional<int64_t> axis) {
  check_range("fake_quant", qmin, qmax);
  return check_grid_parameter("fake_quant", x, log_scale, "log_scale", axis);
}

std::optional<int64_t> check_fake_quant_offset(const at::Tensor& x, const at::Tensor& log_scale,
                                               const at::Tensor& offset, int64_t qmin, int64_t qmax,
                                               std::optional<int64_t> axis) {
  check_range("fake_quant_offset", qmin, qmax);
  check_grid_parameter("fake_quant_offset", x, offset, "offset", axis);
  return check_grid_parameter("fake_quant_offset", x, log_scale, "log_scale", axis);
}

void check_fake_quant(at::TensorList x, at::TensorList log_scale, int64_t qmin, int64_t qmax,
                      std::optional<int64_t> axis, at::ArrayRef<double> grad_scale) {
  check_range("fake_quant", qmin, qmax);
  check_grid_parameters("fake_quant", x, log_scale, "log_scale", axis);
  check_grad_scales("fake_quant", x, grad_scale);
}

void check_fake_quant_offset(at::TensorList x, at::TensorList log_scale, at::TensorList offset, int64_t qmin,
                             int64_t qmax, std::optional<int64_t> axis, at::ArrayRef<double> grad_scale) {
  check_range("fake_quant_offset", qmin, qmax);
  check_grid_parameters("fake_quant_offset", x, log_scale, "log_scale", axis);
  check_grid_parameters("fake_quant_offset", x, offset, "offset", axis);
  check_grad_scales("fake_quant_offset", x, grad_scale);
}

std::optional<int64_t> check_pact(const at::Tensor& x, const at::Tensor& log_alpha, int64_t bits,
                                  std::optional<int64_t> axis) {
  TORCH_CHECK(1 <= bits && bits <= 16, "pact: bits must be in [1, 16], got ", bits);
  return check_grid_parameter("pact", x, log_alpha, "log_alpha", axis);
}

namespace {

// A view onto the per-channel operators: a channel is a group.
at::Tensor grouped(const at::Tensor& x, const at::Tensor& log_scale, int64_t qmin, int64_t qmax, int64_t group_size,
                   double grad_scale, const std::optional<at::Tensor>& offset) {
  constexpr auto op = "fake_quant_groups";
  TORCH_CHECK(x.dim() >= 1, op, ": x must have at least one dimension, got a scalar");
  TORCH_CHECK(group_size >= 1, op, ": group_size must be at least 1, got ", group_size);
  const c10::SymInt rows = x.sym_size(0);
  const c10::SymInt columns = x.dim() == 1 ? c10::SymInt(1) : c10::multiply_integers(x.sym_sizes().slice(1));
  TORCH_SYM_CHECK((columns % group_size).sym_eq(0), op, ": group_size must divide the ", columns,
                  " elements of each index of dimension 0, got ", group_size);
  const c10::SymInt groups = columns / group_size;
  const auto check = [&](const at::Tensor& parameter, const char* name) {
    TORCH_CHECK(parameter.dim() == 2, op, ": ", name, " must be rows x groups, got shape ", parameter.sym_sizes());
    TORCH_SYM_CHECK(parameter.sym_size(0).sym_eq(rows).sym_and(parameter.sym_size(1).sym_eq(groups)), op, ": ", name,
                    " must be rows x groups, ", rows, " x ", groups, ", got shape ", parameter.sym_sizes());
  };
  check(log_scale, "log_scale");
  const at::Tensor members = x.reshape_symint({rows * groups, group_size});
  at::Tensor y;
  if (offset) {
    check(*offset, "offset");
    y = fake_quant_offset(members, log_scale.reshape(-1), offset->reshape(-1), qmin, qmax, 0, grad_scale);
  } else {
    y = fake_quant(members, log_scale.reshape(-1), qmin, qmax, 0, grad_scale);
  }
  return y.view_symint(x.sym_sizes()).contiguous(x.suggest_memory_format());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("fake_quant(Tensor x, Tensor log_scale, int qmin, int qmax, int? axis=None, float grad_scale=1.0) -> Tensor",
        tags);
  m.def(
      "fake_quant_backward(Tensor grad, Tensor x, Tensor log_scale, int qmin, int qmax, int? axis, float grad_scale) "
      "-> (Tensor, Tensor)",
      tags);
  m.def(
      "fake_quant_offset(Tensor x, Tensor log_scale, Tensor offset, int qmin, int qmax, int? axis=None, "
      "float grad_scale=1.0) -> Tensor",
      tags);
  m.def(
      "fake_quant_offset_backward(Tensor grad, Tensor x, Tensor log_scale, Tensor offset, int qmin, int qmax, "
      "int? axis, float grad_scale) -> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "fake_quant.list(Tensor[] x, Tensor[] log_scale, int qmin, int qmax, int? axis=None, float[] grad_scale=[]) -> "
      "Tensor[]",
      tags);
  m.def(
      "fake_quant_backward.list(Tensor[] grad, Tensor[] x, Tensor[] log_scale, int qmin, int qmax, int? axis, "
      "float[] grad_scale) -> (Tensor[], Tensor[])",
      tags);
  m.def(
      "fake_quant_offset.list(Tensor[] x, Tensor[] log_scale, Tensor[] offset, int qmin, int qmax, int? axis=None, "
      "float[] grad_scale=[]) -> Tensor[]",
      tags);
  m.def(
      "fake_quant_offset_backward.list(Tensor[] grad, Tensor[] x, Tensor[] log_scale, Tensor[] offset, int qmin, "
      "int qmax, int? axis, float[] grad_scale) -> (Tensor[], Tensor[], Tensor[])",
      tags);
  m.def(
      "fake_quant_groups(Tensor x, Tensor log_scale, int qmin, int qmax, int group_size, float grad_scale=1.0, "
      "Tensor? offset=None) -> Tensor",
      tags);
  m.def("pact(Tensor x, Tensor log_alpha, int bits, int? axis=None) -> Tensor", tags);
  m.def("pact_backward(Tensor grad, Tensor x, Tensor log_alpha, int bits, int? axis) -> (Tensor, Tensor)", tags);
}

TORCH_LIBRARY_IMPL(cctorch, CompositeImplicitAutograd, m) { m.impl("fake_quant_groups", &grouped); }

}  // namespace cctorch
