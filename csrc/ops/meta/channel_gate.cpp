#include "csrc/ops/channel_gate.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"

namespace cctorch::meta {
namespace {

at::Tensor channel_gate(const at::Tensor& x, const at::Tensor& gate) {
  check_channel_gate(x, gate);
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor> channel_gate_backward(const at::Tensor& grad, const at::Tensor& x,
                                                         const at::Tensor& gate) {
  check_channel_gate(x, gate);
  check_backward(grad, x, "channel_gate_backward");
  return {at::empty_like(x), at::empty_like(gate)};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Meta, m) {
  m.impl("channel_gate", &channel_gate);
  m.impl("channel_gate_backward", &channel_gate_backward);
}

}  // namespace cctorch::meta
