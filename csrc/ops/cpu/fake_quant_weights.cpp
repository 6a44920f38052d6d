#include "csrc/ops/fake_quant_weights.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <bit>

#include "csrc/ops/cpu/channelwise.h"
#include "csrc/ops/cpu/fitted_rows.h"
#include "csrc/ops/cpu/largest.h"
#include "csrc/ops/mask.h"

namespace cctorch::cpu {
namespace {

template <typename S>
void quantize(const std::vector<SliceRows>& rows, const std::vector<at::Tensor>& scales, int64_t bits) {
  using T = at::opmath_type<S>;
  using Bits = formula::BitsOf<S>;
  constexpr auto type = c10::CppTypeToScalarType<S>::value;
  const auto infinity = static_cast<Bits>(infinity_bits(type));
  const auto formula = formula::FakeQuantWeights<T>::with_qmax(symmetric_qmax(bits));
  const auto loops = channelwise::loops<formula::FakeQuant<T>>(type);
  struct Nothing {};
  fit_rows<S, Nothing>(
      rows,
      [&](Nothing&, size_t weight, int64_t row, const S* from, int64_t size) {
        const Bits bits_of_largest = largest_magnitude(reinterpret_cast<const Bits*>(from), size, infinity);
        return scales[weight].mutable_data_ptr<T>()[row] =
                   formula.scale(static_cast<T>(std::bit_cast<S>(bits_of_largest)));
      },
      [&](Nothing&, T scale, S* to, const S* from, int64_t, int64_t size, simd::Stores stores) {
        loops.forward(formula.grid, to, from, size, scale, stores);
      });
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> fake_quant_weights(at::TensorList weights, int64_t bits,
                                                                                int64_t axis) {
  check_fake_quant_weights(weights, bits, axis);
  const auto rows = rows_of(weights, axis);
  std::vector<at::Tensor> scales;
  for (const at::Tensor& weight : weights) {
    scales.push_back(empty_scales(weight, axis));
    if (weight.numel() == 0) scales.back().fill_(1);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weights[0].scalar_type(), "fake_quant_weights",
                                  [&] { quantize<scalar_t>(rows, scales, bits); });
  return {results_of(rows, weights), scales};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) { m.impl("fake_quant_weights", &fake_quant_weights); }

}  // namespace cctorch::cpu
