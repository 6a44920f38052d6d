#include "csrc/ops/lstm_cell.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstddef>

#include "csrc/ops/cpu/channelwise.h"
#include "csrc/ops/cpu/isa.h"
#include "csrc/ops/cpu/simd/lstm_cell.h"

namespace cctorch::cpu {
namespace {

constexpr int64_t kElements = 2048;  // of c, for a task

// Row `i` of a contiguous tensor.
const std::byte* row(const at::Tensor& x, int64_t i) {
  return static_cast<const std::byte*>(x.const_data_ptr()) + i * x.size(1) * x.itemsize();
}
std::byte* mutable_row(const at::Tensor& x, int64_t i) {
  return static_cast<std::byte*>(x.mutable_data_ptr()) + i * x.size(1) * x.itemsize();
}

// run(loops, example, features)
template <typename Function>
void for_each_example(const at::Tensor& c, const Function& run) {
  const auto loops = for_isa(&simd::baseline::lstm_cell, &simd::avx2::lstm_cell,
                             &simd::avx512::lstm_cell)(channelwise::storage(c.scalar_type()));
  const int64_t grain = std::max<int64_t>(1, kElements / std::max<int64_t>(1, c.size(1)));
  at::parallel_for(0, c.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(loops, i, c.size(1));
  });
}

std::tuple<at::Tensor, at::Tensor> lstm_cell(const at::Tensor& gates, const at::Tensor& c) {
  check_lstm_cell(gates, c);
  const at::Tensor from = gates.contiguous(), cells = c.contiguous();
  at::Tensor h = at::empty(c.sizes(), c.options()), next = at::empty(c.sizes(), c.options());
  for_each_example(cells, [&](const simd::LstmCellLoops& loops, int64_t i, int64_t n) {
    loops.forward(row(from, i), row(cells, i), n, mutable_row(h, i), mutable_row(next, i));
  });
  return {h, next};
}

std::tuple<at::Tensor, at::Tensor> lstm_cell_backward(const at::Tensor& grad_h, const at::Tensor& grad_c,
                                                      const at::Tensor& gates, const at::Tensor& c) {
  check_lstm_cell_backward(grad_h, grad_c, gates, c);
  const at::Tensor of_h = grad_h.contiguous(), of_c = grad_c.contiguous();
  const at::Tensor from = gates.contiguous(), cells = c.contiguous();
  at::Tensor grad_gates = at::empty(gates.sizes(), gates.options()), previous = at::empty(c.sizes(), c.options());
  for_each_example(cells, [&](const simd::LstmCellLoops& loops, int64_t i, int64_t n) {
    loops.backward(row(of_h, i), row(of_c, i), row(from, i), row(cells, i), n, mutable_row(grad_gates, i),
                   mutable_row(previous, i));
  });
  return {grad_gates, previous};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) {
  m.impl("lstm_cell", &lstm_cell);
  m.impl("lstm_cell_backward", &lstm_cell_backward);
}

}  // namespace cctorch::cpu
