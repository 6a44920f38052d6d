#include "csrc/ops/cpu/simd/lstm_cell.h"

#include "csrc/ops/cpu/simd/reader.h"
#include "csrc/ops/formula/lstm_cell.h"

namespace cctorch::simd::CCTORCH_ISA {
namespace {

template <typename S, typename T>
void forward(const void* gates, const void* c, int64_t n, void* next_h, void* next_c) {
  const formula::LstmCell<T> formula;
  Reader<S, T> read_i, read_f, read_g, read_o, read_c;
  Writer<S, T> write_h, write_c;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t size = tile_size(begin, n);
    const T* is = read_i(gates, begin, size);
    const T* fs = read_f(gates, n + begin, size);
    const T* gs = read_g(gates, 2 * n + begin, size);
    const T* os = read_o(gates, 3 * n + begin, size);
    const T* cs = read_c(c, begin, size);
    T* hs = write_h.tile(next_h, begin);
    T* nexts = write_c.tile(next_c, begin);
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) {
      const auto state = formula.forward(is[j], fs[j], gs[j], os[j], cs[j]);
      hs[j] = state.h;
      nexts[j] = state.c;
    }
    write_h.flush(next_h, begin, size);
    write_c.flush(next_c, begin, size);
  }
}

template <typename S, typename T>
void backward(const void* grad_h, const void* grad_c, const void* gates, const void* c, int64_t n, void* grad_gates,
              void* grad_previous_c) {
  const formula::LstmCell<T> formula;
  Reader<S, T> read_grad_h, read_grad_c, read_i, read_f, read_g, read_o, read_c;
  Writer<S, T> write_i, write_f, write_g, write_o, write_c;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t size = tile_size(begin, n);
    const T* grad_hs = read_grad_h(grad_h, begin, size);
    const T* grad_cs = read_grad_c(grad_c, begin, size);
    const T* is = read_i(gates, begin, size);
    const T* fs = read_f(gates, n + begin, size);
    const T* gs = read_g(gates, 2 * n + begin, size);
    const T* os = read_o(gates, 3 * n + begin, size);
    const T* cs = read_c(c, begin, size);
    T* of_i = write_i.tile(grad_gates, begin);
    T* of_f = write_f.tile(grad_gates, n + begin);
    T* of_g = write_g.tile(grad_gates, 2 * n + begin);
    T* of_o = write_o.tile(grad_gates, 3 * n + begin);
    T* of_c = write_c.tile(grad_previous_c, begin);
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) {
      const auto gradients = formula.backward(grad_hs[j], grad_cs[j], is[j], fs[j], gs[j], os[j], cs[j]);
      of_i[j] = gradients.i;
      of_f[j] = gradients.f;
      of_g[j] = gradients.g;
      of_o[j] = gradients.o;
      of_c[j] = gradients.c;
    }
    write_i.flush(grad_gates, begin, size);
    write_f.flush(grad_gates, n + begin, size);
    write_g.flush(grad_gates, 2 * n + begin, size);
    write_o.flush(grad_gates, 3 * n + begin, size);
    write_c.flush(grad_previous_c, begin, size);
  }
}

template <typename S, typename T>
constexpr LstmCellLoops of{&forward<S, T>, &backward<S, T>};

}  // namespace

LstmCellLoops lstm_cell(Storage storage) {
  return with_types(storage, []<typename S, typename T>() { return of<S, T>; });
}

}  // namespace cctorch::simd::CCTORCH_ISA
