#include "csrc/ops/lstm_cell.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace cctorch::meta {
namespace {

at::Tensor empty_of(const at::Tensor& x) { return at::empty_symint(x.sym_sizes(), x.options()); }

std::tuple<at::Tensor, at::Tensor> lstm_cell(const at::Tensor& gates, const at::Tensor& c) {
  check_lstm_cell(gates, c);
  return {empty_of(c), empty_of(c)};
}

std::tuple<at::Tensor, at::Tensor> lstm_cell_backward(const at::Tensor& grad_h, const at::Tensor& grad_c,
                                                      const at::Tensor& gates, const at::Tensor& c) {
  check_lstm_cell_backward(grad_h, grad_c, gates, c);
  return {empty_of(gates), empty_of(c)};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Meta, m) {
  m.impl("lstm_cell", &lstm_cell);
  m.impl("lstm_cell_backward", &lstm_cell_backward);
}

}  // namespace cctorch::meta
