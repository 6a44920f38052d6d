#include <cctorch/gates.h>

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/sigmoid.h>
#include <cctorch/channel_gate.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "csrc/ops/checks.h"

namespace cctorch {

at::Tensor sigmoid_gate(const at::Tensor& x, const at::Tensor& logit, double temperature) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::sigmoid_gate", "").typed<decltype(sigmoid_gate)>();
  return op.call(x, logit, temperature);
}

at::Tensor hard_concrete(const at::Tensor& log_alpha, bool training, double beta, double gamma, double zeta,
                         std::optional<at::Generator> generator) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::hard_concrete", "").typed<decltype(hard_concrete)>();
  return op.call(log_alpha, training, beta, gamma, zeta, std::move(generator));
}

at::Tensor hard_concrete_open(const at::Tensor& log_alpha, double beta, double gamma, double zeta) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cctorch::hard_concrete_open", "")
                             .typed<decltype(hard_concrete_open)>();
  return op.call(log_alpha, beta, gamma, zeta);
}

namespace {

bool positive(double value) { return value > 0 && value < std::numeric_limits<double>::infinity(); }

void check_hard_concrete(const char* op, const at::Tensor& log_alpha, double beta, double gamma, double zeta) {
  check_floating(log_alpha, op, "log_alpha");
  TORCH_CHECK(positive(beta), op, ": beta must be positive and finite, got ", beta);
  TORCH_CHECK(positive(-gamma) && positive(zeta - 1), op,
              ": expected gamma < 0 and zeta > 1, both finite, got gamma = ", gamma, " and zeta = ", zeta);
}

at::Tensor composed_sigmoid_gate(const at::Tensor& x, const at::Tensor& logit, double temperature) {
  TORCH_CHECK(positive(temperature), "sigmoid_gate: temperature must be positive and finite, got ", temperature);
  check_floating(logit, "sigmoid_gate", "logit");
  return channel_gate(x, at::sigmoid(logit / temperature));
}

at::Tensor composed_hard_concrete(const at::Tensor& log_alpha, bool training, double beta, double gamma, double zeta,
                                  std::optional<at::Generator> generator) {
  check_hard_concrete("hard_concrete", log_alpha, beta, gamma, zeta);
  at::Tensor logit = log_alpha;
  if (training) {
    const auto options = log_alpha.options();
    // u = 0 would give an infinite logit: its gate is 0 all the same, and so is its gradient.
    const auto u = at::rand_symint(log_alpha.sym_sizes(), std::move(generator), options);
    logit = (u.log() - (-u).log1p() + log_alpha) / beta;
  }
  return (at::sigmoid(logit) * (zeta - gamma) + gamma).clamp(0, 1);
}

at::Tensor composed_hard_concrete_open(const at::Tensor& log_alpha, double beta, double gamma, double zeta) {
  check_hard_concrete("hard_concrete_open", log_alpha, beta, gamma, zeta);
  return at::sigmoid(log_alpha - beta * std::log(-gamma / zeta));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  m.def("sigmoid_gate(Tensor x, Tensor logit, float temperature=1.0) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def(
      "hard_concrete(Tensor log_alpha, bool training, float beta=0.6666666666666666, float gamma=-0.1, "
      "float zeta=1.1, *, Generator? generator=None) -> Tensor",
      {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded});
  m.def(
      "hard_concrete_open(Tensor log_alpha, float beta=0.6666666666666666, float gamma=-0.1, float zeta=1.1) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(cctorch, CompositeImplicitAutograd, m) {
  m.impl("sigmoid_gate", &composed_sigmoid_gate);
  m.impl("hard_concrete", &composed_hard_concrete);
  m.impl("hard_concrete_open", &composed_hard_concrete_open);
}

}  // namespace cctorch
