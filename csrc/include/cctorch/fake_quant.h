#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

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

// LSQ+ (Bhalgat et al. 2020, eq. 3 to 6), the same around a learned offset of log_scale's shape and type:
//
//   y = fake_quant(x - offset, log_scale, ...) + offset
//
// The offset's gradient is that of y outside of the range and 0 inside, times `grad_scale`.
at::Tensor fake_quant_offset(const at::Tensor& x, const at::Tensor& log_scale, const at::Tensor& offset, int64_t qmin,
                             int64_t qmax, std::optional<int64_t> axis = std::nullopt, double grad_scale = 1.0);

// Each x of a list with the log_scale at its place, a model's weights at once: `grad_scale` has a factor for each of
// them, or is empty for 1. All x are of one type and on one device.
std::vector<at::Tensor> fake_quant(at::TensorList x, at::TensorList log_scale, int64_t qmin, int64_t qmax,
                                   std::optional<int64_t> axis = std::nullopt, at::ArrayRef<double> grad_scale = {});
std::vector<at::Tensor> fake_quant_offset(at::TensorList x, at::TensorList log_scale, at::TensorList offset,
                                          int64_t qmin, int64_t qmax, std::optional<int64_t> axis = std::nullopt,
                                          at::ArrayRef<double> grad_scale = {});

// One scale, and one offset where there is one, for every `group_size` consecutive elements in row-major order of each
// index of dimension 0: log_scale is x.size(0) x groups.
at::Tensor fake_quant_groups(const at::Tensor& x, const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                             int64_t group_size, double grad_scale = 1.0,
                             const std::optional<at::Tensor>& offset = std::nullopt);

// PACT (Choi et al. 2018, eq. 1 to 3): clip(x, 0, alpha) rounded to 2^bits - 1 steps, alpha = exp(log_alpha). Backward:
// straight-through for 0 <= x < alpha; alpha's gradient is the sum of y's where x >= alpha, times alpha for the
// logarithm.
at::Tensor pact(const at::Tensor& x, const at::Tensor& log_alpha, int64_t bits,
                std::optional<int64_t> axis = std::nullopt);

}  // namespace cctorch
