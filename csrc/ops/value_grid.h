#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/value_grid.h>

#include <tuple>

#include "csrc/ops/checks.h"
#include "csrc/ops/dispatch.h"

namespace cctorch {

using BinaryQuantOp = at::Tensor(const at::Tensor&, std::optional<int64_t>);
using BinaryQuantListOp = std::vector<at::Tensor>(at::TensorList, std::optional<int64_t>);
using TernaryQuantOp = BinaryQuantOp;
using TernaryQuantListOp = BinaryQuantListOp;
using BinaryCodeQuantOp = at::Tensor(const at::Tensor&, int64_t, std::string_view, std::optional<int64_t>);
using BinaryCodeQuantListOp = std::vector<at::Tensor>(at::TensorList, int64_t, std::string_view,
                                                      std::optional<int64_t>);
using CodebookOp = at::Tensor(const at::Tensor&, const at::Tensor&);
using CodebookListOp = std::vector<at::Tensor>(at::TensorList, at::TensorList);
using MemberSumsOp = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&);
using MemberSumsListOp = std::vector<at::Tensor>(at::TensorList, at::TensorList, at::TensorList);

std::tuple<at::Tensor> binary_quant_backward(const at::Tensor& grad, const at::Tensor& x, std::optional<int64_t> axis);

Lists<1> binary_quant_list_backward(at::TensorList grad, at::TensorList x, std::optional<int64_t> axis);

// The sum of the values of each member, 0 to count - 1. A GPU's additions to one place wait for each other, and the
// places of a codebook are few: each has so many copies, which take turns and are added up at last.
at::Tensor sums_of_members(const at::Tensor& values, const at::Tensor& members, const c10::SymInt& count,
                           int64_t copies);

// For each value of the codebook the sum of those of `values` whose x is nearest to it.
at::Tensor member_sums(const at::Tensor& values, const at::Tensor& x, const at::Tensor& codebook);
std::vector<at::Tensor> member_sums(at::TensorList values, at::TensorList x, at::TensorList codebook);
std::tuple<at::Tensor, at::Tensor, at::Tensor> member_sums_backward(const at::Tensor& grad, const at::Tensor& values,
                                                                    const at::Tensor& x, const at::Tensor& codebook);

Lists<3> member_sums_list_backward(at::TensorList grad, at::TensorList values, at::TensorList x,
                                   at::TensorList codebook);

std::tuple<at::Tensor, at::Tensor> codebook_quant_backward(const at::Tensor& grad, const at::Tensor& x,
                                                           const at::Tensor& codebook);
Lists<2> codebook_quant_list_backward(at::TensorList grad, at::TensorList x, at::TensorList codebook);

// Of ATen's operators: on every backend.
namespace composite {

BinaryQuantOp binary_quant;
BinaryQuantListOp binary_quant_list;
CodebookOp codebook_quant, codebook_indices, codebook_update;
CodebookListOp codebook_quant_list, codebook_update_list;
MemberSumsOp member_sums;
MemberSumsListOp member_sums_list;

}  // namespace composite

// These raise where an argument is wrong and return the axis counted from the front.
std::optional<int64_t> check_value_grid(const char* op, const at::Tensor& x, std::optional<int64_t> axis);
std::optional<int64_t> check_binary_code_quant(const at::Tensor& x, int64_t bits, std::string_view method,
                                               std::optional<int64_t> axis);
void check_value_grid(const char* op, at::TensorList x, std::optional<int64_t> axis);
void check_binary_code_quant(at::TensorList x, int64_t bits, std::string_view method, std::optional<int64_t> axis);
void check_codebook(const char* op, const at::Tensor& x, const at::Tensor& codebook, const Name& x_name = "x",
                    const Name& codebook_name = "codebook");
void check_codebooks(const char* op, at::TensorList x, at::TensorList codebook);

}  // namespace cctorch
