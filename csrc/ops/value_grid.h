#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/value_grid.h>

#include <tuple>

namespace cctorch {

std::tuple<at::Tensor> binary_quant_backward(const at::Tensor& grad, const at::Tensor& x, std::optional<int64_t> axis);
std::tuple<at::Tensor, at::Tensor> codebook_quant_backward(const at::Tensor& grad, const at::Tensor& x,
                                                           const at::Tensor& codebook);

// These raise where an argument is wrong and return the axis counted from the front.
std::optional<int64_t> check_value_grid(const char* op, const at::Tensor& x, std::optional<int64_t> axis);
std::optional<int64_t> check_binary_code_quant(const at::Tensor& x, int64_t bits, std::string_view method,
                                               std::optional<int64_t> axis);
void check_codebook(const char* op, const at::Tensor& x, const at::Tensor& codebook);

}  // namespace cctorch
