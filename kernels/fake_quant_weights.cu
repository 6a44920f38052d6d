#include "kernels/fake_quant_weights.cuh"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "csrc/ops/fake_quant_weights.h"
#include "csrc/ops/mask.h"
#include "kernels/launch.cuh"

namespace cctorch::cuda {
namespace {

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> fake_quant_weights(at::TensorList weights, int64_t bits,
                                                                                int64_t axis) {
  check_fake_quant_weights(weights, bits, axis);
  const c10::cuda::CUDAGuard guard(weights[0].device());
  std::vector<SliceRows> rows;
  std::vector<at::Tensor> scales;
  std::vector<quantize_rows::Entry> entries;
  int64_t first = 0;
  for (const at::Tensor& weight : weights) {
    rows.emplace_back(weight, axis);
    scales.push_back(empty_scales(weight, axis));
    if (weight.numel() == 0) {
      scales.back().fill_(1);
      continue;
    }
    entries.push_back({rows.back().from.const_data_ptr(), rows.back().to.mutable_data_ptr(),
                       scales.back().mutable_data_ptr(), rows.back().size(), first});
    first += rows.back().count();
  }
  entries.push_back({nullptr, nullptr, nullptr, 0, first});
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weights[0].scalar_type(), "fake_quant_weights", [&] {
    quantize_rows::quantize<scalar_t, at::opmath_type<scalar_t>>(Launch(), entries, symmetric_qmax(bits),
                                                                 infinity_bits(weights[0].scalar_type()));
  });
  std::vector<at::Tensor> quantized;
  for (size_t i = 0; i < rows.size(); ++i) quantized.push_back(rows[i].result(weights[i]));
  return {quantized, scales};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CUDA, m) { m.impl("fake_quant_weights", &fake_quant_weights); }

}  // namespace cctorch::cuda
