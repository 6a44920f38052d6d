#include "csrc/ops/value_grid.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "csrc/ops/meta/lists.h"

namespace cctorch::meta {
namespace {

at::Tensor binary_quant(const at::Tensor& x, std::optional<int64_t> axis) {
  check_value_grid("binary_quant", x, axis);
  return at::empty_like(x);
}

at::Tensor ternary_quant(const at::Tensor& x, std::optional<int64_t> axis) {
  check_value_grid("ternary_quant", x, axis);
  return at::empty_like(x);
}

at::Tensor binary_code_quant(const at::Tensor& x, int64_t bits, std::string_view method, std::optional<int64_t> axis) {
  check_binary_code_quant(x, bits, method, axis);
  return at::empty_like(x);
}

at::Tensor codebook_quant(const at::Tensor& x, const at::Tensor& codebook) {
  check_codebook("codebook_quant", x, codebook);
  return at::empty_like(x);
}

at::Tensor codebook_indices(const at::Tensor& x, const at::Tensor& codebook) {
  check_codebook("codebook_indices", x, codebook);
  return at::empty_symint(x.sym_sizes(), x.options().dtype(at::kLong).memory_format(at::MemoryFormat::Contiguous));
}

at::Tensor codebook_update(const at::Tensor& x, const at::Tensor& codebook) {
  check_codebook("codebook_update", x, codebook);
  return at::empty_like(codebook, at::MemoryFormat::Contiguous);
}

std::vector<at::Tensor> codebook_quant_list(at::TensorList x, at::TensorList codebook) {
  check_codebooks("codebook_quant", x, codebook);
  return empty_list_like(x);
}

std::vector<at::Tensor> codebook_update_list(at::TensorList x, at::TensorList codebook) {
  check_codebooks("codebook_update", x, codebook);
  return empty_parameters_like(codebook);
}

at::Tensor member_sums(const at::Tensor&, const at::Tensor&, const at::Tensor& codebook) {
  return at::empty_like(codebook, at::MemoryFormat::Contiguous);
}

std::vector<at::Tensor> member_sums_list(at::TensorList, at::TensorList, at::TensorList codebook) {
  return empty_parameters_like(codebook);
}

std::vector<at::Tensor> binary_quant_list(at::TensorList x, std::optional<int64_t> axis) {
  check_value_grid("binary_quant", x, axis);
  return empty_list_like(x);
}

std::vector<at::Tensor> ternary_quant_list(at::TensorList x, std::optional<int64_t> axis) {
  check_value_grid("ternary_quant", x, axis);
  return empty_list_like(x);
}

std::vector<at::Tensor> binary_code_quant_list(at::TensorList x, int64_t bits, std::string_view method,
                                               std::optional<int64_t> axis) {
  check_binary_code_quant(x, bits, method, axis);
  return empty_list_like(x);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Meta, m) {
  m.impl("binary_quant", &binary_quant);
  m.impl("ternary_quant", &ternary_quant);
  m.impl("binary_code_quant", &binary_code_quant);
  m.impl("binary_quant.list", &binary_quant_list);
  m.impl("ternary_quant.list", &ternary_quant_list);
  m.impl("binary_code_quant.list", &binary_code_quant_list);
  m.impl("codebook_quant", &codebook_quant);
  m.impl("codebook_indices", &codebook_indices);
  m.impl("codebook_update", &codebook_update);
  m.impl("codebook_quant.list", &codebook_quant_list);
  m.impl("codebook_update.list", &codebook_update_list);
  m.impl("_member_sums", &member_sums);
  m.impl("_member_sums.list", &member_sums_list);
}

}  // namespace cctorch::meta
