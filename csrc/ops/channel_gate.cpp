#include "csrc/ops/channel_gate.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"

namespace cctorch {

at::Tensor channel_gate(const at::Tensor& x, const at::Tensor& gate) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::channel_gate", "").typed<decltype(channel_gate)>();
  return op.call(x, gate);
}

std::tuple<at::Tensor, at::Tensor> channel_gate_backward(const at::Tensor& grad, const at::Tensor& x,
                                                         const at::Tensor& gate) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cctorch::channel_gate_backward", "")
                             .typed<decltype(channel_gate_backward)>();
  return op.call(grad, x, gate);
}

void check_channel_gate(const at::Tensor& x, const at::Tensor& gate) {
  constexpr auto op = "channel_gate";
  check_floating(x, op, "x");
  const bool half = x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
  TORCH_CHECK(gate.scalar_type() == x.scalar_type() || (half && gate.scalar_type() == at::kFloat), op,
              ": gate must have the type of x, ", x.scalar_type(), half ? ", or be float32" : "", ", got ",
              gate.scalar_type());
  check_same_device(x, op, "x", gate, "gate");
  TORCH_CHECK(x.dim() >= 2, op, ": x must have at least two dimensions, batch x channels x ..., got shape ",
              x.sym_sizes());
  TORCH_CHECK(gate.dim() == 1, op, ": gate must be one-dimensional, got shape ", gate.sym_sizes());
  TORCH_SYM_CHECK(gate.sym_size(0).sym_eq(x.sym_size(1)), op, ": gate must have one element for each of the ",
                  x.sym_size(1), " channels (dimension 1) of x, got ", gate.sym_size(0));
}

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  m.def("channel_gate(Tensor x, Tensor gate) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("channel_gate_backward(Tensor grad, Tensor x, Tensor gate) -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
}

}  // namespace cctorch
