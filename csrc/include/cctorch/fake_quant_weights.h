#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace cctorch {

// Fake-quantization of a model's weights at once, each slice along `axis` on a symmetric grid that just holds it:
//
//   q = 2^(bits - 1) - 1,  s = max|w| / q,  y = s * round(w / s)
//
// Returns the quantized weights and their scales (one per index of `axis`; float32 for half-precision weights). Nothing
// is clipped, so the straight-through gradient of every weight is that of its y; scales are constants. A NaN stays NaN
// and has no say in its slice's scale.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> fake_quant_weights(at::TensorList weights, int64_t bits,
                                                                                int64_t axis = 0);

}  // namespace cctorch
