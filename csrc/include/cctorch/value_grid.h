#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

// Quantization to few values that are computed from the weights themselves: of the whole tensor, or with `axis` of each
// index of that dimension.
namespace cctorch {

// mean|x| * sign(x), 0 counted as positive (XNOR-Net, Rastegari et al. 2016, eq. 6). Backward: straight-through where
// |x| <= 1, 0 elsewhere.
at::Tensor binary_quant(const at::Tensor& x, std::optional<int64_t> axis = std::nullopt);

// The scaled ternary values -a, 0, a of the smallest squared error (Li et al. 2016, eq. 3), found exactly.
// Straight-through.
at::Tensor ternary_quant(const at::Tensor& x, std::optional<int64_t> axis = std::nullopt);

// a_1 b_1 + ... + a_bits b_bits with every b in {-1, 1}. "greedy": each code from what the ones before leave (Guo et
// al. 2017). "alternating": the optimum for 1 and 2 bits; from there every further code greedily, then 20 turns of
// nearest codes and least squares (Xu et al. 2018). Straight-through.
at::Tensor binary_code_quant(const at::Tensor& x, int64_t bits, std::string_view method = "alternating",
                             std::optional<int64_t> axis = std::nullopt);

// Each x of a list of one type and on one device. On CUDA rows of one width are searched together, of whichever x.
std::vector<at::Tensor> binary_quant(at::TensorList x, std::optional<int64_t> axis = std::nullopt);
std::vector<at::Tensor> ternary_quant(at::TensorList x, std::optional<int64_t> axis = std::nullopt);
std::vector<at::Tensor> binary_code_quant(at::TensorList x, int64_t bits, std::string_view method = "alternating",
                                          std::optional<int64_t> axis = std::nullopt);

// The nearest of the codebook's values, the lower of two as near; codebook is one-dimensional in any order, float32 for
// half-precision x and of x's type otherwise. A NaN in it is the nearest for every x, as for argmin. Backward:
// straight-through to x, to each value the sum over its members.
at::Tensor codebook_quant(const at::Tensor& x, const at::Tensor& codebook);

// Which value that is: int64, of the shape of x.
at::Tensor codebook_indices(const at::Tensor& x, const at::Tensor& codebook);

// One step of K-means: each value becomes the mean of its members; one without members stays.
at::Tensor codebook_update(const at::Tensor& x, const at::Tensor& codebook);

// Each x of a list of one type and on one device, with the codebook at its place.
std::vector<at::Tensor> codebook_quant(at::TensorList x, at::TensorList codebook);
std::vector<at::Tensor> codebook_update(at::TensorList x, at::TensorList codebook);

}  // namespace cctorch
