#include "kernels/lstm_cell.cuh"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "csrc/ops/lstm_cell.h"
#include "kernels/launch.cuh"

namespace cctorch::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor> lstm_cell(const at::Tensor& gates, const at::Tensor& c) {
  check_lstm_cell(gates, c);
  const c10::cuda::CUDAGuard guard(c.device());
  const at::Tensor from = gates.contiguous(), cells = c.contiguous();
  at::Tensor h = at::empty(c.sizes(), c.options()), next = at::empty(c.sizes(), c.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, c.scalar_type(), "lstm_cell", [&] {
    lstm::forward<scalar_t, at::opmath_type<scalar_t>>(Launch(), c.size(0), c.size(1), from.const_data_ptr<scalar_t>(),
                                                       cells.const_data_ptr<scalar_t>(), h.mutable_data_ptr<scalar_t>(),
                                                       next.mutable_data_ptr<scalar_t>());
  });
  return {h, next};
}

std::tuple<at::Tensor, at::Tensor> lstm_cell_backward(const at::Tensor& grad_h, const at::Tensor& grad_c,
                                                      const at::Tensor& gates, const at::Tensor& c) {
  check_lstm_cell_backward(grad_h, grad_c, gates, c);
  const c10::cuda::CUDAGuard guard(c.device());
  const at::Tensor of_h = grad_h.contiguous(), of_c = grad_c.contiguous();
  const at::Tensor from = gates.contiguous(), cells = c.contiguous();
  at::Tensor grad_gates = at::empty(gates.sizes(), gates.options()), previous = at::empty(c.sizes(), c.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, c.scalar_type(), "lstm_cell_backward", [&] {
    lstm::backward<scalar_t, at::opmath_type<scalar_t>>(
        Launch(), c.size(0), c.size(1), of_h.const_data_ptr<scalar_t>(), of_c.const_data_ptr<scalar_t>(),
        from.const_data_ptr<scalar_t>(), cells.const_data_ptr<scalar_t>(), grad_gates.mutable_data_ptr<scalar_t>(),
        previous.mutable_data_ptr<scalar_t>());
  });
  return {grad_gates, previous};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CUDA, m) {
  m.impl("lstm_cell", &lstm_cell);
  m.impl("lstm_cell_backward", &lstm_cell_backward);
}

}  // namespace cctorch::cuda
