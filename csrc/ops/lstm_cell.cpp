#include "csrc/ops/lstm_cell.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <torch/library.h>

#include <array>
#include <vector>

#include "csrc/ops/checks.h"
#include "csrc/ops/dispatch.h"

namespace cctorch {
namespace {

constexpr auto op = "lstm_cell";

// i, f, g and o after their activations.
std::array<at::Tensor, 4> activated(const at::Tensor& gates) {
  const std::vector<at::Tensor> parts = gates.chunk(4, 1);
  return {parts[0].sigmoid(), parts[1].sigmoid(), parts[2].tanh(), parts[3].sigmoid()};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> lstm_cell(const at::Tensor& gates, const at::Tensor& c) {
  static const auto handle = find_operator<decltype(lstm_cell)>("cctorch::lstm_cell");
  return handle.call(gates, c);
}

std::tuple<at::Tensor, at::Tensor> lstm_cell_backward(const at::Tensor& grad_h, const at::Tensor& grad_c,
                                                      const at::Tensor& gates, const at::Tensor& c) {
  static const auto handle = find_operator<decltype(lstm_cell_backward)>("cctorch::lstm_cell_backward");
  return handle.call(grad_h, grad_c, gates, c);
}

void check_lstm_cell(const at::Tensor& gates, const at::Tensor& c) {
  check_floating(gates, op, "gates");
  check_same_device(gates, op, "gates", c, "c");
  TORCH_CHECK(gates.scalar_type() == c.scalar_type(), op, ": c must have the type of gates, ", gates.scalar_type(),
              ", got ", c.scalar_type());
  TORCH_CHECK(gates.dim() == 2 && c.dim() == 2, op,
              ": gates must be batch x 4 hidden and c batch x hidden, got shapes ", gates.sym_sizes(), " and ",
              c.sym_sizes());
  TORCH_SYM_CHECK(gates.sym_size(0).sym_eq(c.sym_size(0)), op, ": gates and c must be of one batch, got shapes ",
                  gates.sym_sizes(), " and ", c.sym_sizes());
  TORCH_SYM_CHECK(gates.sym_size(1).sym_eq(c.sym_size(1) * 4), op, ": gates must have four times the features of c, ",
                  c.sym_size(1), ", got shape ", gates.sym_sizes());
}

void check_lstm_cell_backward(const at::Tensor& grad_h, const at::Tensor& grad_c, const at::Tensor& gates,
                              const at::Tensor& c) {
  check_lstm_cell(gates, c);
  check_backward(grad_h, c, "lstm_cell_backward", "grad_h", "c");
  check_backward(grad_c, c, "lstm_cell_backward", "grad_c", "c");
}

namespace fallback {

std::tuple<at::Tensor, at::Tensor> lstm_cell(const at::Tensor& gates, const at::Tensor& c) {
  check_lstm_cell(gates, c);
  const auto [i, f, g, o] = activated(gates);
  const at::Tensor next = f * c + i * g;
  return {o * next.tanh(), next};
}

std::tuple<at::Tensor, at::Tensor> lstm_cell_backward(const at::Tensor& grad_h, const at::Tensor& grad_c,
                                                      const at::Tensor& gates, const at::Tensor& c) {
  check_lstm_cell_backward(grad_h, grad_c, gates, c);
  const auto [i, f, g, o] = activated(gates);
  const at::Tensor squashed = (f * c + i * g).tanh();
  const at::Tensor grad = grad_c + grad_h * o * (1 - squashed * squashed);
  const at::Tensor grad_gates = at::cat(
      {grad * g * i * (1 - i), grad * c * f * (1 - f), grad * i * (1 - g * g), grad_h * squashed * o * (1 - o)}, 1);
  return {grad_gates, grad * f};
}

}  // namespace fallback

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("lstm_cell(Tensor gates, Tensor c) -> (Tensor, Tensor)", tags);
  m.def("lstm_cell_backward(Tensor grad_h, Tensor grad_c, Tensor gates, Tensor c) -> (Tensor, Tensor)", tags);
}

TORCH_LIBRARY_IMPL(cctorch, CompositeExplicitAutograd, m) {
  m.impl("lstm_cell", &fallback::lstm_cell);
  m.impl("lstm_cell_backward", &fallback::lstm_cell_backward);
}

TORCH_LIBRARY_IMPL(cctorch, FuncTorchBatchedDecomposition, m) {
  m.impl("lstm_cell", &fallback::lstm_cell);
  m.impl("lstm_cell_backward", &fallback::lstm_cell_backward);
}

}  // namespace cctorch
