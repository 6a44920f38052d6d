#pragma once

#include "csrc/ops/formula/logistic.h"

namespace cctorch::formula {

// One feature of an LSTM's cell (Hochreiter and Schmidhuber 1997, with forget gates): what comes of the four gates
// before their activations, in PyTorch's order, and of the cell of the step before.
template <typename T>
struct LstmCell {
  struct State {
    T h, c;
  };
  struct Gradients {
    T i, f, g, o, c;
  };

  CCTORCH_HOST_DEVICE State forward(T i, T f, T g, T o, T c) const {
    const T next = sigmoid(f) * c + sigmoid(i) * tanh(g);
    return {sigmoid(o) * tanh(next), next};
  }

  // Of the same arguments: the activations are made again.
  CCTORCH_HOST_DEVICE Gradients backward(T grad_h, T grad_c, T i, T f, T g, T o, T c) const {
    const T in = sigmoid(i), forget = sigmoid(f), candidate = tanh(g), out = sigmoid(o);
    const T squashed = tanh(forget * c + in * candidate);
    const T grad = grad_c + grad_h * out * (1 - squashed * squashed);
    return {grad * candidate * in * (1 - in), grad * c * forget * (1 - forget), grad * in * (1 - candidate * candidate),
            grad_h * squashed * out * (1 - out), grad * forget};
  }
};

}  // namespace cctorch::formula
