#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "csrc/ops/mask.h"
#include "kernels/weight_rows.cuh"

namespace cctorch::cuda {
namespace {

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> fake_quant_weights(at::TensorList weights, int64_t bits,
                                                                                int64_t axis) {
  check_fake_quant_weights(weights, bits, axis);
  const c10::cuda::CUDAGuard guard(weights[0].device());
  std::vector<at::Tensor> scales;
  for (const at::Tensor& weight : weights) {
    scales.push_back(empty_scales(weight, axis));
    if (weight.numel() == 0) scales.back().fill_(1);
  }
  const WeightRows rows(weights, axis, scales);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weights[0].scalar_type(), "fake_quant_weights", [&] {
    using T = at::opmath_type<scalar_t>;
    using Bits = formula::BitsOf<scalar_t>;
    rows.map(row_map::OnLargest<scalar_t, T>{formula::FakeQuantWeights<T>::with_qmax(symmetric_qmax(bits)),
                                             static_cast<Bits>(infinity_bits(weights[0].scalar_type()))});
  });
  return {rows.results(weights), scales};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CUDA, m) { m.impl("fake_quant_weights", &fake_quant_weights); }

}  // namespace cctorch::cuda
