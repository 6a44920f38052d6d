#pragma once

#include <cctorch/safetensors.h>

#include <cstdint>
#include <string>

namespace cctorch {

// A weight that was quantized, weight[i] = scales[i] * codes[i], as a file holds it. In place of "weight" there are
//
//   weight.codes   uint8: the codes, bits for each, two's complement, row-major, without gaps, low bits first
//   weight.scales  one for each index of dimension 0, float32 or float64
//   weight.grid    int64: bits, then the weight's shape
//
// so that a network of 4 bits takes an eighth of its float32 state. What is read back equals what was written.

// Does so with the tensor `name` of `state`. Throws c10::ValueError where there is none, or none with a dimension;
// where scales are not one for each index, not finite or not positive; for other than 2 to 16 bits; and where the
// tensor has a value that is no code times its scale, rounded to the tensor's type. `state` is then as it was.
void encode_weight(Safetensors::Tensors& state, const std::string& name, const at::Tensor& scales, int64_t bits);

// `state` with plain tensors, of the type of the scales, in place of all that encode_weight made; the same without any.
// Throws c10::ValueError where codes, scales and grid do not fit each other.
Safetensors::Tensors decode_weights(Safetensors::Tensors state);

}  // namespace cctorch
