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

template <typename S>
using Formula = formula::SoftThreshold<at::opmath_type<S>>;

at::Tensor soft_threshold(const at::Tensor& x, const at::Tensor& threshold, std::optional<int64_t> axis) {
  axis = check_soft_threshold(x, threshold, axis);
  const c10::cuda::CUDAGuard guard(x.device());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "soft_threshold", [&] {
    return forward<scalar_t, Raw>(Formula<scalar_t>{}, x, threshold, axis);
  });
}

std::tuple<at::Tensor, at::Tensor> soft_threshold_backward(const at::Tensor& grad, const at::Tensor& x,
                                                           const at::Tensor& threshold, std::optional<int64_t> axis) {
  axis = check_soft_threshold(x, threshold, axis);
  check_backward(grad, x, "soft_threshold_backward");
  const c10::cuda::CUDAGuard guard(x.device());
  const auto gradients = AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "soft_threshold_backward",
      [&] { return backward<scalar_t, Raw>(Formula<scalar_t>{}, grad, x, threshold, axis, 1.0); });
  return {gradients[0], gradients[1]};
}

std::vector<at::Tensor> soft_threshold_list(at::TensorList x, at::TensorList threshold, std::optional<int64_t> axis) {
  check_soft_threshold(x, threshold, axis);
  const c10::cuda::CUDAGuard guard(x[0].device());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x[0].scalar_type(), "soft_threshold", [&] {
    return forward<scalar_t, Raw>(Formula<scalar_t>{}, x, {threshold}, axis);
  });
}

Lists<2> soft_threshold_list_backward(at::TensorList grad, at::TensorList x, at::TensorList threshold,
                                      std::optional<int64_t> axis) {
  check_soft_threshold(x, threshold, axis);
  check_backward(grad, x, "soft_threshold_backward");
  const c10::cuda::CUDAGuard guard(x[0].device());
  const auto gradients = AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x[0].scalar_type(), "soft_threshold_backward",
      [&] { return backward<scalar_t, Raw>(Formula<scalar_t>{}, grad, x, {threshold}, axis, {}); });
  return {gradients[0], gradients[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CUDA, m) {
  m.impl("soft_threshold", &soft_threshold);
  m.impl("soft_threshold_backward", &soft_threshold_backward);
  m.impl("soft_threshold.list", &soft_threshold_list);
  m.impl("soft_threshold_backward.list", &soft_threshold_list_backward);
}

}  // namespace cctorch::cuda
