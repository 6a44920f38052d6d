#include "csrc/ops/batch_norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "csrc/ops/batch_norm_passes.h"
#include "csrc/ops/checks.h"

namespace cctorch::meta {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm(const at::Tensor& x, const at::Tensor& weight,
                                                          const at::Tensor& bias, double) {
  check_batch_norm(x, {{"weight", &weight}, {"bias", &bias}});
  check_not_empty(x);
  const bool half = x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
  const auto statistics = weight.options().dtype(half ? at::kFloat : x.scalar_type());
  return {at::empty_like(x), at::empty_symint(weight.sym_sizes(), statistics),
          at::empty_symint(weight.sym_sizes(), statistics)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                   const at::Tensor& weight, const at::Tensor&,
                                                                   const at::Tensor&, double) {
  check_backward(grad, x, "batch_norm_backward");
  return {at::empty_like(x), at::empty_like(weight), at::empty_like(weight)};
}

at::Tensor batch_norm_inference(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                const at::Tensor& mean, const at::Tensor& var, double) {
  check_batch_norm(x, {{"weight", &weight}, {"bias", &bias}, {"mean", &mean}, {"var", &var}});
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor> pair_per_channel(const at::Tensor& x) {
  const auto options = x.options().dtype(at::kDouble);
  return {at::empty_symint({x.sym_size(1)}, options), at::empty_symint({x.sym_size(1)}, options)};
}

std::tuple<at::Tensor, at::Tensor> batch_norm_moments(const at::Tensor& x) {
  check_batch_norm_pass("batch_norm_moments", x, {});
  check_not_empty(x);
  return pair_per_channel(x);
}

at::Tensor batch_norm_affine(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& scale,
                             const at::Tensor& constant) {
  check_batch_norm_pass("batch_norm_affine", x, {mean, scale, constant});
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor> batch_norm_grad_sums(const at::Tensor& grad, const at::Tensor& x,
                                                        const at::Tensor& mean) {
  check_batch_norm_pass("batch_norm_grad_sums", x, {mean});
  check_backward(grad, x, "batch_norm_grad_sums");
  return pair_per_channel(x);
}

at::Tensor batch_norm_grad_input(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean,
                                 const at::Tensor& constant, const at::Tensor& scale, const at::Tensor& slope) {
  check_batch_norm_pass("batch_norm_grad_input", x, {mean, constant, scale, slope});
  check_backward(grad, x, "batch_norm_grad_input");
  return at::empty_like(x);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Meta, m) {
  m.impl("batch_norm_moments", &batch_norm_moments);
  m.impl("batch_norm_affine", &batch_norm_affine);
  m.impl("batch_norm_grad_sums", &batch_norm_grad_sums);
  m.impl("batch_norm_grad_input", &batch_norm_grad_input);
  m.impl("batch_norm", &batch_norm);
  m.impl("batch_norm_backward", &batch_norm_backward);
  m.impl("batch_norm_inference", &batch_norm_inference);
}

}  // namespace cctorch::meta
