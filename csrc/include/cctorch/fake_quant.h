#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace cctorch {

// Learned-scale fake-quantization (LSQ, Esser et al. 2020, eq. 1 to 5):
//
//   s = exp(log_scale),  y = s * clamp(round(x / s), qmin, qmax)
//
// Per tensor with `axis` absent (log_scale has one element), else one scale for each index of dimension `axis`. The
// scale is learned through its logarithm, so it is positive whatever the optimizer does. Backward: straight-through for
// x / s inside [qmin, qmax], ends included; LSQ's scale gradient times `grad_scale`, times s for the logarithm.
// log_scale is float32 for half-precision x and of x's type otherwise.
at::Tensor fake_quant(const at::Tensor& x, const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                      std::optional<int64_t> axis = std::nullopt, double grad_scale = 1.0);

}  // namespace cctorch
