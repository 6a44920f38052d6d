#include "csrc/ops/value_grid.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "csrc/ops/dispatch.h"
#include "csrc/ops/learned_grid.h"
#include "csrc/ops/rows.h"

namespace cctorch {

at::Tensor binary_quant(const at::Tensor& x, std::optional<int64_t> axis) {
  static const auto op = find_operator<BinaryQuantOp>("cctorch::binary_quant");
  return op.call(x, axis);
}

at::Tensor ternary_quant(const at::Tensor& x, std::optional<int64_t> axis) {
  static const auto op = find_operator<TernaryQuantOp>("cctorch::ternary_quant");
  return op.call(x, axis);
}

at::Tensor binary_code_quant(const at::Tensor& x, int64_t bits, std::string_view method, std::optional<int64_t> axis) {
  static const auto op = find_operator<BinaryCodeQuantOp>("cctorch::binary_code_quant");
  return op.call(x, bits, method, axis);
}

std::vector<at::Tensor> binary_quant(at::TensorList x, std::optional<int64_t> axis) {
  static const auto op = find_operator<BinaryQuantListOp>("cctorch::binary_quant", "list");
  return op.call(x, axis);
}

std::vector<at::Tensor> ternary_quant(at::TensorList x, std::optional<int64_t> axis) {
  static const auto op = find_operator<TernaryQuantListOp>("cctorch::ternary_quant", "list");
  return op.call(x, axis);
}

std::vector<at::Tensor> binary_code_quant(at::TensorList x, int64_t bits, std::string_view method,
                                          std::optional<int64_t> axis) {
  static const auto op = find_operator<BinaryCodeQuantListOp>("cctorch::binary_code_quant", "list");
  return op.call(x, bits, method, axis);
}

at::Tensor codebook_quant(const at::Tensor& x, const at::Tensor& codebook) {
  static const auto op = find_operator<CodebookOp>("cctorch::codebook_quant");
  return op.call(x, codebook);
}

at::Tensor codebook_indices(const at::Tensor& x, const at::Tensor& codebook) {
  static const auto op = find_operator<decltype(codebook_indices)>("cctorch::codebook_indices");
  return op.call(x, codebook);
}

at::Tensor codebook_update(const at::Tensor& x, const at::Tensor& codebook) {
  static const auto op = find_operator<CodebookOp>("cctorch::codebook_update");
  return op.call(x, codebook);
}

std::vector<at::Tensor> codebook_quant(at::TensorList x, at::TensorList codebook) {
  static const auto op = find_operator<CodebookListOp>("cctorch::codebook_quant", "list");
  return op.call(x, codebook);
}

std::vector<at::Tensor> codebook_update(at::TensorList x, at::TensorList codebook) {
  static const auto op = find_operator<CodebookListOp>("cctorch::codebook_update", "list");
  return op.call(x, codebook);
}

at::Tensor member_sums(const at::Tensor& values, const at::Tensor& x, const at::Tensor& codebook) {
  static const auto op = find_operator<MemberSumsOp>("cctorch::_member_sums");
  return op.call(values, x, codebook);
}

std::vector<at::Tensor> member_sums(at::TensorList values, at::TensorList x, at::TensorList codebook) {
  static const auto op = find_operator<MemberSumsListOp>("cctorch::_member_sums", "list");
  return op.call(values, x, codebook);
}

std::tuple<at::Tensor> binary_quant_backward(const at::Tensor& grad, const at::Tensor& x, std::optional<int64_t>) {
  return {at::where(x.abs() <= 1, grad, 0)};
}

Lists<1> binary_quant_list_backward(at::TensorList grad, at::TensorList x, std::optional<int64_t> axis) {
  std::vector<at::Tensor> gradients;
  for (size_t i = 0; i < x.size(); ++i) gradients.push_back(std::get<0>(binary_quant_backward(grad[i], x[i], axis)));
  return {gradients};
}

at::Tensor sums_of_members(const at::Tensor& values, const at::Tensor& members, const c10::SymInt& count,
                           int64_t copies) {
  if (copies == 1) return at::zeros_symint({count}, values.options()).index_add(0, members, values);
  const at::Tensor copy = at::arange(c10::Scalar(members.sym_numel()), members.options()).remainder(copies);
  return at::zeros_symint({copies * count}, values.options())
      .index_add(0, at::add(members, copy, c10::Scalar(count)), values)
      .view_symint({copies, count})
      .sum(0);
}

std::tuple<at::Tensor, at::Tensor> codebook_quant_backward(const at::Tensor& grad, const at::Tensor& x,
                                                           const at::Tensor& codebook) {
  return {grad, member_sums(grad, x, codebook)};
}

Lists<2> codebook_quant_list_backward(at::TensorList grad, at::TensorList x, at::TensorList codebook) {
  return {grad.vec(), member_sums(grad, x, codebook)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> member_sums_backward(const at::Tensor& grad, const at::Tensor& values,
                                                                    const at::Tensor& x, const at::Tensor& codebook) {
  return {grad.index({codebook_indices(x, codebook)}).to(values.scalar_type()), {}, {}};
}

Lists<3> member_sums_list_backward(at::TensorList grad, at::TensorList values, at::TensorList x,
                                   at::TensorList codebook) {
  std::vector<at::Tensor> of_values, none(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    of_values.push_back(std::get<0>(member_sums_backward(grad[i], values[i], x[i], codebook[i])));
  }
  return {of_values, none, none};
}

std::optional<int64_t> check_value_grid(const char* op, const at::Tensor& x, std::optional<int64_t> axis) {
  check_floating(x, op, "x");
  if (axis) axis = check_axis(x, *axis, op, "x");
  return axis;
}

void check_value_grid(const char* op, at::TensorList x, std::optional<int64_t> axis) {
  check_like_tensors(x, op, "x");
  check_axes(x, axis, op);
}

namespace {

void check_code(int64_t bits, std::string_view method) {
  constexpr auto op = "binary_code_quant";
  TORCH_CHECK(1 <= bits && bits <= 8, op, ": bits must be in [1, 8], got ", bits);
  TORCH_CHECK(method == "greedy" || method == "alternating", op, ": method must be greedy or alternating, got ",
              method);
}

}  // namespace

std::optional<int64_t> check_binary_code_quant(const at::Tensor& x, int64_t bits, std::string_view method,
                                               std::optional<int64_t> axis) {
  check_code(bits, method);
  return check_value_grid("binary_code_quant", x, axis);
}

void check_binary_code_quant(at::TensorList x, int64_t bits, std::string_view method, std::optional<int64_t> axis) {
  check_code(bits, method);
  check_value_grid("binary_code_quant", x, axis);
}

void check_codebook(const char* op, const at::Tensor& x, const at::Tensor& codebook, const Name& x_name,
                    const Name& codebook_name) {
  check_floating(x, op, x_name);
  TORCH_CHECK(codebook.scalar_type() == math_type(x), op, ": ", codebook_name, " must be ", math_type(x), " for ",
              x.scalar_type(), " ", x_name, ", got ", codebook.scalar_type(), "; convert it with ", codebook_name,
              ".to(...)");
  check_same_device(x, op, x_name, codebook, codebook_name);
  TORCH_CHECK(codebook.dim() == 1, op, ": ", codebook_name, " must be one-dimensional, got shape ",
              codebook.sym_sizes());
  TORCH_SYM_CHECK(codebook.sym_size(0).sym_ge(1), op, ": ", codebook_name, " must have at least one value, got none");
}

void check_codebooks(const char* op, at::TensorList x, at::TensorList codebook) {
  check_like_tensors(x, op, "x");
  check_as_many(codebook.size(), x, op, "codebook");
  for (size_t i = 0; i < x.size(); ++i) check_codebook(op, x[i], codebook[i], Name("x", i), Name("codebook", i));
}

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("binary_quant(Tensor x, int? axis=None) -> Tensor", tags);
  m.def("ternary_quant(Tensor x, int? axis=None) -> Tensor", tags);
  m.def("binary_code_quant(Tensor x, int bits, str method=\"alternating\", int? axis=None) -> Tensor", tags);
  m.def("binary_quant.list(Tensor[] x, int? axis=None) -> Tensor[]", tags);
  m.def("ternary_quant.list(Tensor[] x, int? axis=None) -> Tensor[]", tags);
  m.def("binary_code_quant.list(Tensor[] x, int bits, str method=\"alternating\", int? axis=None) -> Tensor[]", tags);
  m.def("codebook_quant(Tensor x, Tensor codebook) -> Tensor", tags);
  m.def("codebook_indices(Tensor x, Tensor codebook) -> Tensor", tags);
  m.def("codebook_update(Tensor x, Tensor codebook) -> Tensor", tags);
  m.def("codebook_quant.list(Tensor[] x, Tensor[] codebook) -> Tensor[]", tags);
  m.def("codebook_update.list(Tensor[] x, Tensor[] codebook) -> Tensor[]", tags);
  m.def("_member_sums(Tensor values, Tensor x, Tensor codebook) -> Tensor", tags);
  m.def("_member_sums.list(Tensor[] values, Tensor[] x, Tensor[] codebook) -> Tensor[]", tags);
}

}  // namespace cctorch
