#include "csrc/ops/batch_norm.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/rows.h"

namespace cctorch {

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm(const at::Tensor& x, const at::Tensor& weight,
                                                          const at::Tensor& bias, double eps) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::batch_norm", "").typed<decltype(batch_norm)>();
  return op.call(x, weight, bias, eps);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                   const at::Tensor& weight, const at::Tensor& mean,
                                                                   const at::Tensor& inverse_deviation, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cctorch::batch_norm_backward", "")
                             .typed<decltype(batch_norm_backward)>();
  return op.call(grad, x, weight, mean, inverse_deviation, eps);
}

at::Tensor batch_norm_inference(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                const at::Tensor& mean, const at::Tensor& var, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cctorch::batch_norm_inference", "")
                             .typed<decltype(batch_norm_inference)>();
  return op.call(x, weight, bias, mean, var, eps);
}

void check_batch_norm(const at::Tensor& x, std::initializer_list<NamedTensor> parameters) {
  constexpr auto op = "batch_norm";
  check_floating(x, op, "x");
  TORCH_CHECK(x.dim() == 4, op, ": x must be N x C x H x W, got shape ", x.sym_sizes());
  for (const auto& [name, parameter] : parameters) {
    TORCH_CHECK(parameter->scalar_type() == x.scalar_type(), op, ": ", name, " must have the type of x, ",
                x.scalar_type(), ", got ", parameter->scalar_type());
    check_same_device(x, op, "x", *parameter, name);
    TORCH_CHECK(parameter->dim() == 1, op, ": ", name, " must be one-dimensional, got shape ", parameter->sym_sizes());
    TORCH_SYM_CHECK(parameter->sym_size(0).sym_eq(x.sym_size(1)), op, ": ", name, " must have one element for each of ",
                    x.sym_size(1), " channels, got ", parameter->sym_size(0));
  }
}

void check_not_empty(const at::Tensor& x) {
  TORCH_SYM_CHECK(x.sym_numel().sym_gt(0), "batch_norm: x must have at least one element for each channel, got shape ",
                  x.sym_sizes());
}

namespace fallback {

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm(const at::Tensor& x, const at::Tensor& weight,
                                                          const at::Tensor& bias, double eps) {
  check_batch_norm(x, {{"weight", &weight}, {"bias", &bias}});
  check_not_empty(x);
  auto [y, mean, inverse] = at::native_batch_norm(x, weight, bias, {}, {}, /*training=*/true, /*momentum=*/0.0, eps);
  const auto type = math_type(x);
  return {y, mean.to(type), inverse.to(type)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                   const at::Tensor& weight, const at::Tensor& mean,
                                                                   const at::Tensor& inverse_deviation, double eps) {
  check_backward(grad, x, "batch_norm_backward");
  // The CPU kernel wants the statistics in the type that it returned them in.
  const auto type = x.is_cpu() ? x.scalar_type() : mean.scalar_type();
  return at::native_batch_norm_backward(grad, x, weight, {}, {}, mean.to(type), inverse_deviation.to(type),
                                        /*train=*/true, eps, {true, true, true});
}

at::Tensor batch_norm_inference(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                const at::Tensor& mean, const at::Tensor& var, double eps) {
  check_batch_norm(x, {{"weight", &weight}, {"bias", &bias}, {"mean", &mean}, {"var", &var}});
  // The backward pass of native_batch_norm divides by the number of elements, on CPU as integers.
  if (TORCH_GUARD_OR_FALSE(x.sym_numel().sym_eq(0))) {
    return at::add(at::mul(x, weight.view({-1, 1, 1})), bias.view({-1, 1, 1}));
  }
  return std::get<0>(at::native_batch_norm(x, weight, bias, mean, var, /*training=*/false, /*momentum=*/0.0, eps));
}

}  // namespace fallback

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  m.def("batch_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "batch_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor inverse_deviation, float eps) "
      "-> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def("batch_norm_inference(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, float eps) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

// On CUDA this is all there is.
TORCH_LIBRARY_IMPL(cctorch, CompositeExplicitAutograd, m) {
  m.impl("batch_norm", &fallback::batch_norm);
  m.impl("batch_norm_backward", &fallback::batch_norm_backward);
  m.impl("batch_norm_inference", &fallback::batch_norm_inference);
}

}  // namespace cctorch
