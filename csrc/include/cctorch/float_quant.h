#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace cctorch {

// x / s rounded to 8-bit floating point, times s = exp(log_scale). `dtype` is at::kFloat8_e4m3fn (up to 448) or
// at::kFloat8_e5m2 (up to 57344). To the nearest, a tie to the even mantissa; what is larger saturates. Arguments and
// gradients are those of fake_quant.
at::Tensor fp8_quant(const at::Tensor& x, const at::Tensor& log_scale, at::ScalarType dtype = at::kFloat8_e4m3fn,
                     std::optional<int64_t> axis = std::nullopt, double grad_scale = 1.0);

// Each x of a list, of one type and on one device, with the log_scale at its place; grad_scale as for fake_quant.
std::vector<at::Tensor> fp8_quant(at::TensorList x, at::TensorList log_scale, at::ScalarType dtype = at::kFloat8_e4m3fn,
                                  std::optional<int64_t> axis = std::nullopt, at::ArrayRef<double> grad_scale = {});

// The nearest of 0 and +-2^top, +-2^(top-1), ..., 2^(bits-1) - 1 magnitudes in all, with INQ's top =
// floor(log2(4/3 max|x|)) (Zhou et al. 2017, eq. 2 and 3), of the tensor or of each index of `axis`. Straight-through.
at::Tensor power_of_two_quant(const at::Tensor& x, int64_t bits, std::optional<int64_t> axis = std::nullopt);

// Each x of a list of one type and on one device.
std::vector<at::Tensor> power_of_two_quant(at::TensorList x, int64_t bits, std::optional<int64_t> axis = std::nullopt);

}  // namespace cctorch
