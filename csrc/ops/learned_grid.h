#pragma once

#include <optional>

#include "csrc/ops/checks.h"

namespace cctorch {

// A parameter of quantization: one element without axis, else one for each index of that dimension of x. Returns the
// axis counted from the front.
std::optional<int64_t> check_grid_parameter(const char* op, const at::Tensor& x, const at::Tensor& parameter,
                                            const Name& name, std::optional<int64_t> axis, const Name& x_name = "x");

// The same for lists: as many parameters as tensors of x, which are of one type.
void check_grid_parameters(const char* op, at::TensorList x, at::TensorList parameters, const char* name,
                           std::optional<int64_t> axis);

// Whether all tensors have the axis, where there is one.
void check_axes(at::TensorList x, std::optional<int64_t> axis, const char* op);

// One for each tensor of x, or none: all are 1.
void check_grad_scales(const char* op, at::TensorList x, at::ArrayRef<double> grad_scale);

}  // namespace cctorch
