#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

// Gates that training drives to 0 or 1. They are small vectors, composed of ATen's operators; channel_gate()
// multiplies.
namespace cctorch {

// y[n, c, ...] = x[n, c, ...] * sigmoid(logit[c] / temperature): towards a step as the temperature falls to 0.
at::Tensor sigmoid_gate(const at::Tensor& x, const at::Tensor& logit, double temperature = 1.0);

// The hard concrete distribution (Louizos et al. 2018, eq. 10 to 13), a binary one made differentiable: with u uniform
// in training,
//
//   s = sigmoid((log u - log(1 - u) + log_alpha) / beta),  z = clamp(s (zeta - gamma) + gamma, 0, 1)
//
// and s = sigmoid(log_alpha) else. Needs 0 < beta, gamma < 0 and 1 < zeta. u comes from `generator`, or from the
// device's default one.
at::Tensor hard_concrete(const at::Tensor& log_alpha, bool training, double beta = 2.0 / 3, double gamma = -0.1,
                         double zeta = 1.1, std::optional<at::Generator> generator = std::nullopt);

// The probability that a hard concrete gate is not 0: sigmoid(log_alpha - beta log(-gamma / zeta)). The sum is the
// expected L0 norm, the penalty of the loss.
at::Tensor hard_concrete_open(const at::Tensor& log_alpha, double beta = 2.0 / 3, double gamma = -0.1,
                              double zeta = 1.1);

}  // namespace cctorch
