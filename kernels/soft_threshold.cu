#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/formula/soft_threshold.h"
#include "csrc/ops/soft_threshold.h"
#include "kernels/channelwise.cuh"

namespace cctorch::cuda {
namespace {

at::Tensor soft_threshold(const at::Tensor& x, const at::Tensor& threshold, std::optional<int64_t> axis) {
  axis = check_soft_threshold(x, threshold, axis);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor parameters = broadcast_view(threshold, x, axis);
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "soft_threshold", [&] {
    return forward<scalar_t>(formula::SoftThreshold<at::opmath_type<scalar_t>>{}, x, parameters);
  });
}

std::tuple<at::Tensor, at::Tensor> soft_threshold_backward(const at::Tensor& grad, const at::Tensor& x,
                                                           const at::Tensor& threshold, std::optional<int64_t> axis) {
  axis = check_soft_threshold(x, threshold, axis);
  check_backward(grad, x, "soft_threshold_backward");
  const c10::cuda::CUDAGuard guard(x.device());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "soft_threshold_backward", [&] {
    return backward<scalar_t>(formula::SoftThreshold<at::opmath_type<scalar_t>>{}, grad, x, threshold, axis, 1.0);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CUDA, m) {
  m.impl("soft_threshold", &soft_threshold);
  m.impl("soft_threshold_backward", &soft_threshold_backward);
}

}  // namespace cctorch::cuda
