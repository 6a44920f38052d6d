#pragma once

#include "csrc/ops/formula/lstm_cell.h"
#include "kernels/vector.cuh"

// The cell of an LSTM, from row-major tensors: a thread has `count` features of one example, whose four gates are
// `hidden` numbers apart.
namespace cctorch::cuda::lstm {

// One pack of each gate.
template <typename S, int count>
struct Gates {
  Pack<S, count> i, f, g, o;

  __device__ static Gates loaded(const S* from, int64_t hidden) {
    return {load<count>(from), load<count>(from + hidden), load<count>(from + 2 * hidden),
            load<count>(from + 3 * hidden)};
  }
};

// examples x hidden numbers, in packs that do not reach over the end of a row.
template <int count>
struct Packs {
  int64_t hidden;
  int64_t total;

  int64_t blocks() const { return ceil_div(total, int64_t(kThreads)); }
  // Of the first of its gates.
  __device__ int64_t gates(int64_t pack) const {
    const int64_t example = pack * count / hidden;
    return example * 3 * hidden + pack * count;
  }
};

template <typename S, typename T, int count>
struct Forward {
  struct Shared {};

  Packs<count> packs;
  const S* gates;
  const S* c;
  S* next_h;
  S* next_c;

  __device__ void operator()(Shared&) const {
    const int64_t pack = blockIdx.x * int64_t(kThreads) + threadIdx.x;
    if (pack >= packs.total) return;
    const formula::LstmCell<T> formula;
    const int64_t index = pack * count;
    const auto in = Gates<S, count>::loaded(gates + packs.gates(pack), packs.hidden);
    const auto before = load<count>(c + index);
    Pack<S, count> hs, cs;
    CCTORCH_UNROLL
    for (int k = 0; k < count; ++k) {
      const auto state = formula.forward(static_cast<T>(in.i.values[k]), static_cast<T>(in.f.values[k]),
                                         static_cast<T>(in.g.values[k]), static_cast<T>(in.o.values[k]),
                                         static_cast<T>(before.values[k]));
      hs.values[k] = static_cast<S>(state.h);
      cs.values[k] = static_cast<S>(state.c);
    }
    store(next_h + index, hs);
    store(next_c + index, cs);
  }
};

template <typename S, typename T, int count>
struct Backward {
  struct Shared {};

  Packs<count> packs;
  const S* grad_h;
  const S* grad_c;
  const S* gates;
  const S* c;
  S* grad_gates;
  S* grad_previous_c;

  __device__ void operator()(Shared&) const {
    const int64_t pack = blockIdx.x * int64_t(kThreads) + threadIdx.x;
    if (pack >= packs.total) return;
    const formula::LstmCell<T> formula;
    const int64_t index = pack * count, first = packs.gates(pack);
    const auto in = Gates<S, count>::loaded(gates + first, packs.hidden);
    const auto of_h = load<count>(grad_h + index), of_c = load<count>(grad_c + index), before = load<count>(c + index);
    Gates<S, count> out;
    Pack<S, count> previous;
    CCTORCH_UNROLL
    for (int k = 0; k < count; ++k) {
      const auto gradients = formula.backward(static_cast<T>(of_h.values[k]), static_cast<T>(of_c.values[k]),
                                              static_cast<T>(in.i.values[k]), static_cast<T>(in.f.values[k]),
                                              static_cast<T>(in.g.values[k]), static_cast<T>(in.o.values[k]),
                                              static_cast<T>(before.values[k]));
      out.i.values[k] = static_cast<S>(gradients.i);
      out.f.values[k] = static_cast<S>(gradients.f);
      out.g.values[k] = static_cast<S>(gradients.g);
      out.o.values[k] = static_cast<S>(gradients.o);
      previous.values[k] = static_cast<S>(gradients.c);
    }
    store(grad_gates + first, out.i);
    store(grad_gates + first + packs.hidden, out.f);
    store(grad_gates + first + 2 * packs.hidden, out.g);
    store(grad_gates + first + 3 * packs.hidden, out.o);
    store(grad_previous_c + index, previous);
  }
};

// function.operator()<count>(packs): as many features at once as 16 bytes hold, where rows and tensors begin at such
// addresses; else one.
template <typename S, typename Function, typename... Pointers>
void with_packs(int64_t examples, int64_t hidden, const Function& function, const Pointers*... pointers) {
  if (examples * hidden == 0) return;
  if (hidden % kVector<S> == 0 && are_aligned<kVector<S>>(pointers...)) {
    function.template operator()<kVector<S>>(Packs<kVector<S>>{hidden, examples * hidden / kVector<S>});
  } else {
    function.template operator()<1>(Packs<1>{hidden, examples * hidden});
  }
}

template <typename S, typename T, typename Launch>
void forward(const Launch& launch, int64_t examples, int64_t hidden, const S* gates, const S* c, S* next_h, S* next_c) {
  with_packs<S>(
      examples, hidden,
      [&]<int count>(const Packs<count>& packs) {
        launch(packs.blocks(), Forward<S, T, count>{packs, gates, c, next_h, next_c});
      },
      gates, c, next_h, next_c);
}

template <typename S, typename T, typename Launch>
void backward(const Launch& launch, int64_t examples, int64_t hidden, const S* grad_h, const S* grad_c, const S* gates,
              const S* c, S* grad_gates, S* grad_previous_c) {
  with_packs<S>(
      examples, hidden,
      [&]<int count>(const Packs<count>& packs) {
        launch(packs.blocks(), Backward<S, T, count>{packs, grad_h, grad_c, gates, c, grad_gates, grad_previous_c});
      },
      grad_h, grad_c, gates, c, grad_gates, grad_previous_c);
}

}  // namespace cctorch::cuda::lstm
