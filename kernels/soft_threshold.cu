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
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "soft_threshold", [&] {
    return forward<scalar_t, Given>(formula::SoftThreshold<at::opmath_type<scalar_t>>{}, x, threshold, axis);
  });
}

std::tuple<at::Tensor, at::Tensor> soft_threshold_backward(const at::Tensor& grad, const at::Tensor& x,
                                                           const at::Tensor& threshold, std::optional<int64_t> axis) {
  axis = check_soft_threshold(x, threshold, axis);
  check_backward(grad, x, "soft_threshold_backward");
  const c10::cuda::CUDAGuard guard(x.device());
  const auto [grad_x, sums] =
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "soft_threshold_backward", [&] {
        const formula::SoftThreshold<at::opmath_type<scalar_t>> formula;
        return backward<scalar_t, Given>(formula, grad, x, threshold, axis, 1.0);
      });
  return {grad_x, sums.view(threshold.sizes())};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CUDA, m) {
  m.impl("soft_threshold", &soft_threshold);
  m.impl("soft_threshold_backward", &soft_threshold_backward);
}

}  // namespace cctorch::cuda
