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
formula::FakeQuant<T> lsq(int64_t qmin, int64_t qmax) {
  return {static_cast<T>(qmin), static_cast<T>(qmax)};
}

template <typename T>
formula::Pact<T> clipped(int64_t bits) {
  return {static_cast<T>((int64_t{1} << bits) - 1)};
}

at::Tensor fake_quant(const at::Tensor& x, const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                      std::optional<int64_t> axis, double) {
  axis = check_fake_quant(x, log_scale, qmin, qmax, axis);
  const c10::cuda::CUDAGuard guard(x.device());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "fake_quant", [&] {
    return forward<scalar_t, Raw>(lsq<at::opmath_type<scalar_t>>(qmin, qmax), x, log_scale, axis);
  });
}

std::tuple<at::Tensor, at::Tensor> fake_quant_backward(const at::Tensor& grad, const at::Tensor& x,
                                                       const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                                                       std::optional<int64_t> axis, double grad_scale) {
  axis = check_fake_quant(x, log_scale, qmin, qmax, axis);
  check_backward(grad, x, "fake_quant_backward");
  const c10::cuda::CUDAGuard guard(x.device());
  const auto gradients =
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "fake_quant_backward", [&] {
        return backward<scalar_t, Raw>(lsq<at::opmath_type<scalar_t>>(qmin, qmax), grad, x, log_scale, axis,
                                       grad_scale);
      });
  return {gradients[0], gradients[1]};
}

at::Tensor fake_quant_offset(const at::Tensor& x, const at::Tensor& log_scale, const at::Tensor& offset, int64_t qmin,
                             int64_t qmax, std::optional<int64_t> axis, double) {
  axis = check_fake_quant_offset(x, log_scale, offset, qmin, qmax, axis);
  const c10::cuda::CUDAGuard guard(x.device());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "fake_quant_offset", [&] {
    using T = at::opmath_type<scalar_t>;
    return forward<scalar_t, Raw>(formula::FakeQuantOffset<T>{lsq<T>(qmin, qmax)}, x, {log_scale, offset}, axis);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quant_offset_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                          const at::Tensor& log_scale,
                                                                          const at::Tensor& offset, int64_t qmin,
                                                                          int64_t qmax, std::optional<int64_t> axis,
                                                                          double grad_scale) {
  axis = check_fake_quant_offset(x, log_scale, offset, qmin, qmax, axis);
  check_backward(grad, x, "fake_quant_offset_backward");
  const c10::cuda::CUDAGuard guard(x.device());
  const auto gradients =
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "fake_quant_offset_backward", [&] {
        using T = at::opmath_type<scalar_t>;
        return backward<scalar_t, Raw>(formula::FakeQuantOffset<T>{lsq<T>(qmin, qmax)}, grad, x, {log_scale, offset},
                                       axis, grad_scale);
      });
  return {gradients[0], gradients[1], gradients[2]};
}

std::vector<at::Tensor> fake_quant_list(at::TensorList x, at::TensorList log_scale, int64_t qmin, int64_t qmax,
                                        std::optional<int64_t> axis, at::ArrayRef<double> grad_scale) {
  check_fake_quant(x, log_scale, qmin, qmax, axis, grad_scale);
  const c10::cuda::CUDAGuard guard(x[0].device());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x[0].scalar_type(), "fake_quant", [&] {
    return forward<scalar_t, Raw>(lsq<at::opmath_type<scalar_t>>(qmin, qmax), x, {log_scale}, axis);
  });
}

Lists<2> fake_quant_list_backward(at::TensorList grad, at::TensorList x, at::TensorList log_scale, int64_t qmin,
                                  int64_t qmax, std::optional<int64_t> axis, at::ArrayRef<double> grad_scale) {
  check_fake_quant(x, log_scale, qmin, qmax, axis, grad_scale);
  check_backward(grad, x, "fake_quant_backward");
  const c10::cuda::CUDAGuard guard(x[0].device());
  const auto gradients =
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x[0].scalar_type(), "fake_quant_backward", [&] {
        return backward<scalar_t, Raw>(lsq<at::opmath_type<scalar_t>>(qmin, qmax), grad, x, {log_scale}, axis,
                                       grad_scale);
      });
  return {gradients[0], gradients[1]};
}

std::vector<at::Tensor> fake_quant_offset_list(at::TensorList x, at::TensorList log_scale, at::TensorList offset,
                                               int64_t qmin, int64_t qmax, std::optional<int64_t> axis,
                                               at::ArrayRef<double> grad_scale) {
  check_fake_quant_offset(x, log_scale, offset, qmin, qmax, axis, grad_scale);
  const c10::cuda::CUDAGuard guard(x[0].device());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x[0].scalar_type(), "fake_quant_offset", [&] {
    using T = at::opmath_type<scalar_t>;
    return forward<scalar_t, Raw>(formula::FakeQuantOffset<T>{lsq<T>(qmin, qmax)}, x, {log_scale, offset}, axis);
  });
}

Lists<3> fake_quant_offset_list_backward(at::TensorList grad, at::TensorList x, at::TensorList log_scale,
                                         at::TensorList offset, int64_t qmin, int64_t qmax, std::optional<int64_t> axis,
                                         at::ArrayRef<double> grad_scale) {
  check_fake_quant_offset(x, log_scale, offset, qmin, qmax, axis, grad_scale);
  check_backward(grad, x, "fake_quant_offset_backward");
  const c10::cuda::CUDAGuard guard(x[0].device());
  const auto gradients =
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x[0].scalar_type(), "fake_quant_offset_backward", [&] {
        using T = at::opmath_type<scalar_t>;
        return backward<scalar_t, Raw>(formula::FakeQuantOffset<T>{lsq<T>(qmin, qmax)}, grad, x, {log_scale, offset},
                                       axis, grad_scale);
      });
  return {gradients[0], gradients[1], gradients[2]};
}

at::Tensor pact(const at::Tensor& x, const at::Tensor& log_alpha, int64_t bits, std::optional<int64_t> axis) {
  axis = check_pact(x, log_alpha, bits, axis);
  const c10::cuda::CUDAGuard guard(x.device());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "pact", [&] {
    return forward<scalar_t, Raw>(clipped<at::opmath_type<scalar_t>>(bits), x, log_alpha, axis);
  });
}

std::tuple<at::Tensor, at::Tensor> pact_backward(const at::Tensor& grad, const at::Tensor& x,
                                                 const at::Tensor& log_alpha, int64_t bits,
                                                 std::optional<int64_t> axis) {
  axis = check_pact(x, log_alpha, bits, axis);
  check_backward(grad, x, "pact_backward");
  const c10::cuda::CUDAGuard guard(x.device());
  const auto gradients = AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, x.scalar_type(), "pact_backward",
      [&] { return backward<scalar_t, Raw>(clipped<at::opmath_type<scalar_t>>(bits), grad, x, log_alpha, axis, 1.0); });
  return {gradients[0], gradients[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CUDA, m) {
  m.impl("fake_quant", &fake_quant);
  m.impl("fake_quant_backward", &fake_quant_backward);
  m.impl("fake_quant_offset", &fake_quant_offset);
  m.impl("fake_quant_offset_backward", &fake_quant_offset_backward);
  m.impl("fake_quant.list", &fake_quant_list);
  m.impl("fake_quant_backward.list", &fake_quant_list_backward);
  m.impl("fake_quant_offset.list", &fake_quant_offset_list);
  m.impl("fake_quant_offset_backward.list", &fake_quant_offset_list_backward);
  m.impl("pact", &pact);
  m.impl("pact_backward", &pact_backward);
}

}  // namespace cctorch::cuda
