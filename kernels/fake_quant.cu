#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/fake_quant.h"
#include "csrc/ops/formula/fake_quant.h"
#include "kernels/channelwise.cuh"

namespace cctorch::cuda {
namespace {

template <typename T>
formula::LogFakeQuant<T> log_fake_quant(int64_t qmin, int64_t qmax) {
  return {{static_cast<T>(qmin), static_cast<T>(qmax)}};
}

at::Tensor fake_quant(const at::Tensor& x, const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                      std::optional<int64_t> axis, double) {
  axis = check_fake_quant(x, log_scale, qmin, qmax, axis);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor parameters = broadcast_view(log_scale, x, axis);
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "fake_quant", [&] {
    return forward<scalar_t>(log_fake_quant<at::opmath_type<scalar_t>>(qmin, qmax), x, parameters);
  });
}

std::tuple<at::Tensor, at::Tensor> fake_quant_backward(const at::Tensor& grad, const at::Tensor& x,
                                                       const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                                                       std::optional<int64_t> axis, double grad_scale) {
  axis = check_fake_quant(x, log_scale, qmin, qmax, axis);
  check_backward(grad, x, "fake_quant_backward");
  const c10::cuda::CUDAGuard guard(x.device());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "fake_quant_backward", [&] {
    return backward<scalar_t>(log_fake_quant<at::opmath_type<scalar_t>>(qmin, qmax), grad, x, log_scale, axis,
                              grad_scale);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CUDA, m) {
  m.impl("fake_quant", &fake_quant);
  m.impl("fake_quant_backward", &fake_quant_backward);
}

}  // namespace cctorch::cuda
