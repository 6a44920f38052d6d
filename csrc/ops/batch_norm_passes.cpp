#include "csrc/ops/batch_norm_passes.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <vector>

#include "csrc/ops/batch_norm.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/rows.h"

namespace cctorch {

namespace {

constexpr std::array<int64_t, 3> kReduced = {0, 2, 3};

template <typename Function>
auto operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

// C values, to be spread over x, in the type that x is computed with.
at::Tensor spread(const at::Tensor& values, const at::Tensor& x) {
  return values.to(math_type(x)).view_symint({1, values.sym_size(0), 1, 1});
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> batch_norm_moments(const at::Tensor& x) {
  static const auto op = operation<decltype(batch_norm_moments)>("cctorch::batch_norm_moments");
  return op.call(x);
}

at::Tensor batch_norm_affine(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& scale,
                             const at::Tensor& constant) {
  static const auto op = operation<decltype(batch_norm_affine)>("cctorch::batch_norm_affine");
  return op.call(x, mean, scale, constant);
}

std::tuple<at::Tensor, at::Tensor> batch_norm_grad_sums(const at::Tensor& grad, const at::Tensor& x,
                                                        const at::Tensor& mean) {
  static const auto op = operation<decltype(batch_norm_grad_sums)>("cctorch::batch_norm_grad_sums");
  return op.call(grad, x, mean);
}

at::Tensor batch_norm_grad_input(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean,
                                 const at::Tensor& constant, const at::Tensor& scale, const at::Tensor& slope) {
  static const auto op = operation<decltype(batch_norm_grad_input)>("cctorch::batch_norm_grad_input");
  return op.call(grad, x, mean, constant, scale, slope);
}

void check_batch_norm_pass(const char* op, const at::Tensor& x, at::TensorList per_channel) {
  check_floating(x, op, "x");
  TORCH_CHECK(x.dim() == 4, op, ": x must be N x C x H x W, got shape ", x.sym_sizes());
  for (const at::Tensor& values : per_channel) {
    TORCH_CHECK(values.scalar_type() == at::kDouble && values.dim() == 1, op,
                ": values per channel must be float64 and one-dimensional, got ", values.scalar_type(), " of shape ",
                values.sym_sizes());
    check_same_device(x, op, "x", values, "a value per channel");
    TORCH_SYM_CHECK(values.sym_size(0).sym_eq(x.sym_size(1)), op, ": expected one value for each of ", x.sym_size(1),
                    " channels, got ", values.sym_size(0));
  }
}

namespace fallback {

std::tuple<at::Tensor, at::Tensor> batch_norm_moments(const at::Tensor& x) {
  check_batch_norm_pass("batch_norm_moments", x, {});
  check_not_empty(x);
  const auto [variance, mean] = at::var_mean(x.to(math_type(x)), kReduced, /*correction=*/0);
  return {mean.to(at::kDouble), variance.to(at::kDouble)};
}

at::Tensor batch_norm_affine(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& scale,
                             const at::Tensor& constant) {
  check_batch_norm_pass("batch_norm_affine", x, {mean, scale, constant});
  return at::addcmul(spread(constant - mean * scale, x), x, spread(scale, x)).to(x.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> batch_norm_grad_sums(const at::Tensor& grad, const at::Tensor& x,
                                                        const at::Tensor& mean) {
  check_batch_norm_pass("batch_norm_grad_sums", x, {mean});
  check_backward(grad, x, "batch_norm_grad_sums");
  const at::Tensor wide = grad.to(math_type(x));
  return {wide.sum(kReduced).to(at::kDouble), (wide * (x - spread(mean, x))).sum(kReduced).to(at::kDouble)};
}

at::Tensor batch_norm_grad_input(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean,
                                 const at::Tensor& constant, const at::Tensor& scale, const at::Tensor& slope) {
  check_batch_norm_pass("batch_norm_grad_input", x, {mean, constant, scale, slope});
  check_backward(grad, x, "batch_norm_grad_input");
  const at::Tensor rest = spread(slope * mean - constant * scale, x);
  return at::addcmul(rest, x, spread(-slope, x)).addcmul_(grad, spread(scale, x)).to(x.scalar_type());
}

}  // namespace fallback

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("batch_norm_moments(Tensor x) -> (Tensor, Tensor)", tags);
  m.def("batch_norm_affine(Tensor x, Tensor mean, Tensor scale, Tensor constant) -> Tensor", tags);
  m.def("batch_norm_grad_sums(Tensor grad, Tensor x, Tensor mean) -> (Tensor, Tensor)", tags);
  m.def(
      "batch_norm_grad_input(Tensor grad, Tensor x, Tensor mean, Tensor constant, Tensor scale, Tensor slope) "
      "-> Tensor",
      tags);
}

TORCH_LIBRARY_IMPL(cctorch, CompositeExplicitAutograd, m) {
  m.impl("batch_norm_moments", &fallback::batch_norm_moments);
  m.impl("batch_norm_affine", &fallback::batch_norm_affine);
  m.impl("batch_norm_grad_sums", &fallback::batch_norm_grad_sums);
  m.impl("batch_norm_grad_input", &fallback::batch_norm_grad_input);
}

}  // namespace cctorch
