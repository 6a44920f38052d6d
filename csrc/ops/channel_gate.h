#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/channel_gate.h>

#include <tuple>

namespace cctorch {

std::tuple<at::Tensor, at::Tensor> channel_gate_backward(const at::Tensor& grad, const at::Tensor& x,
                                                         const at::Tensor& gate);

void check_channel_gate(const at::Tensor& x, const at::Tensor& gate);

}  // namespace cctorch
