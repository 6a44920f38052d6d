#pragma once

#include <optional>

#include "csrc/ops/checks.h"

namespace cctorch {

// A parameter of quantization: one element without axis, else one for each index of that dimension of x. Returns the
// axis counted from the front.
std::optional<int64_t> check_grid_parameter(const char* op, const at::Tensor& x, const at::Tensor& parameter,
                                            const char* name, std::optional<int64_t> axis);

}  // namespace cctorch
