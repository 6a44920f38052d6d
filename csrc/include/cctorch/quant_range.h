#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

// Where the scales of fake_quant start: of the whole tensor (one element), or with `axis` of each index of that
// dimension. Results are float32 for half-precision x and of x's type otherwise, without gradients.
namespace cctorch {

// The logarithm of a scale s for [s qmin, s qmax]. "minmax": the smallest that has all of x within. "mse": of r s, with
// that s and r = 1, 0.99, ..., 0.01, the one of the smallest squared error of fake_quant; the largest of several.
at::Tensor quant_range(const at::Tensor& x, int64_t qmin, int64_t qmax, std::optional<int64_t> axis = std::nullopt,
                       std::string_view method = "minmax");

// The same for fake_quant_offset: the logarithm of the scale, and the offset. "minmax": the range is [min x, max x].
// "mse": its upper end moves in hundredths of max x - min x towards the lower one, to the smallest squared error of
// fake_quant_offset; then the lower end in hundredths of what is left towards the upper one.
std::tuple<at::Tensor, at::Tensor> quant_range_offset(const at::Tensor& x, int64_t qmin, int64_t qmax,
                                                      std::optional<int64_t> axis = std::nullopt,
                                                      std::string_view method = "minmax");

// Moving averages of the ends, in place: low <- low + momentum (min x - low), and high with max x. An end that is
// infinite has seen nothing and takes the first value. quant_range(at::stack({low, high}), ..., axis 1) is the range.
void observe_range_(at::Tensor& low, at::Tensor& high, const at::Tensor& x, double momentum = 0.1,
                    std::optional<int64_t> axis = std::nullopt);

}  // namespace cctorch
