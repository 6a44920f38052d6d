#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "csrc/ops/channel_gate.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/formula/channel_gate.h"
#include "kernels/channelwise.cuh"

namespace cctorch::cuda {
namespace {

at::Tensor channel_gate(const at::Tensor& x, const at::Tensor& gate) {
  check_channel_gate(x, gate);
  const c10::cuda::CUDAGuard guard(x.device());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "channel_gate", [&] {
    using T = at::opmath_type<scalar_t>;
    const at::Tensor gates = gate.to(c10::CppTypeToScalarType<T>::value);
    return forward<scalar_t, Given>(formula::ChannelGate<T>{}, x, gates, 1);
  });
}

std::tuple<at::Tensor, at::Tensor> channel_gate_backward(const at::Tensor& grad, const at::Tensor& x,
                                                         const at::Tensor& gate) {
  check_channel_gate(x, gate);
  check_backward(grad, x, "channel_gate_backward");
  const c10::cuda::CUDAGuard guard(x.device());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "channel_gate_backward", [&] {
    using T = at::opmath_type<scalar_t>;
    const at::Tensor gates = gate.to(c10::CppTypeToScalarType<T>::value);
    const auto gradients = backward<scalar_t, Given>(formula::ChannelGate<T>{}, grad, x, gates, 1, 1.0);
    return std::make_tuple(gradients[0], gradients[1].to(gate.scalar_type()));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CUDA, m) {
  m.impl("channel_gate", &channel_gate);
  m.impl("channel_gate_backward", &channel_gate_backward);
}

}  // namespace cctorch::cuda
