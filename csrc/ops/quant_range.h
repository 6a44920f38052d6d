#pragma once

#include <cctorch/quant_range.h>

namespace cctorch {

// These raise where an argument is wrong and return the axis counted from the front.
std::optional<int64_t> check_quant_range(const char* op, const at::Tensor& x, int64_t qmin, int64_t qmax,
                                         std::optional<int64_t> axis, std::string_view method);
std::optional<int64_t> check_observe_range(const at::Tensor& low, const at::Tensor& high, const at::Tensor& x,
                                           double momentum, std::optional<int64_t> axis);

}  // namespace cctorch
