#include "csrc/ops/value_grid.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "kernels/weight_rows.cuh"

namespace cctorch::cuda {
namespace {

std::vector<at::Tensor> signs_of(at::TensorList xs, std::optional<int64_t> axis) {
  const c10::cuda::CUDAGuard guard(xs[0].device());
  const WeightRows rows(xs, axis);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, xs[0].scalar_type(), "binary_quant",
                                  [&] { rows.map(row_map::ScaledSigns<scalar_t, at::opmath_type<scalar_t>>{}); });
  return rows.results(xs);
}

at::Tensor binary_quant(const at::Tensor& x, std::optional<int64_t> axis) {
  axis = check_value_grid("binary_quant", x, axis);
  return WeightRows::are_short(x, axis) ? signs_of(x, axis).front() : composite::binary_quant(x, axis);
}

std::vector<at::Tensor> binary_quant_list(at::TensorList x, std::optional<int64_t> axis) {
  check_value_grid("binary_quant", x, axis);
  return WeightRows::are_short(x, axis) ? signs_of(x, axis) : composite::binary_quant_list(x, axis);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CUDA, m) {
  m.impl("binary_quant", &binary_quant);
  m.impl("binary_quant.list", &binary_quant_list);
}

}  // namespace cctorch::cuda
