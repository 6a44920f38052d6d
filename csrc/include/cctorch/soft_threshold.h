#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace cctorch {

// y = sign(x) relu(|x| - threshold) (STR, Kusupati et al. 2020, eq. 3), whose threshold is sigmoid(s) of a learned s.
// One threshold with `axis` absent, else one for each index of dimension `axis`. Backward: the gradient passes where
// |x| > threshold; that of the threshold is -sign(x) times it, summed. threshold is float32 for half-precision x and of
// x's type otherwise.
at::Tensor soft_threshold(const at::Tensor& x, const at::Tensor& threshold, std::optional<int64_t> axis = std::nullopt);

// Each x of a list, of one type and on one device, with the threshold at its place.
std::vector<at::Tensor> soft_threshold(at::TensorList x, at::TensorList threshold,
                                       std::optional<int64_t> axis = std::nullopt);

}  // namespace cctorch
