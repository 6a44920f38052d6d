#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace cctorch {

// h and c of a step, of `gates`, batch x 4 hidden (i, f, g and o before their activations), and of the c before,
// batch x hidden.
std::tuple<at::Tensor, at::Tensor> lstm_cell(const at::Tensor& gates, const at::Tensor& c);

// The gradients of gates and c.
std::tuple<at::Tensor, at::Tensor> lstm_cell_backward(const at::Tensor& grad_h, const at::Tensor& grad_c,
                                                      const at::Tensor& gates, const at::Tensor& c);

// Of PyTorch's operators: on every backend, and what is differentiated further.
namespace fallback {

decltype(cctorch::lstm_cell) lstm_cell;
decltype(cctorch::lstm_cell_backward) lstm_cell_backward;

}  // namespace fallback

void check_lstm_cell(const at::Tensor& gates, const at::Tensor& c);
void check_lstm_cell_backward(const at::Tensor& grad_h, const at::Tensor& grad_c, const at::Tensor& gates,
                              const at::Tensor& c);

}  // namespace cctorch
