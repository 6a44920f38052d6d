#include "csrc/nn/synchronized_batch_norm.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>
#include <torch/types.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "csrc/ops/batch_norm_passes.h"

namespace cctorch::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Statistics {
  at::Tensor mean, variance, count;
};

// Over all ranks, in float64: their moments add up, around the common mean. The variance is the biased one.
Statistics statistics(const at::Tensor& x, const distributed::Ranks& ranks) {
  const int64_t channels = x.size(1), values = x.numel() / channels;
  at::Tensor own = at::zeros({2 * channels + 1}, x.options().dtype(at::kDouble));
  if (values > 0) {
    const auto [mean, variance] = batch_norm_moments(x);
    own.narrow(0, 0, channels).copy_(mean);
    own.narrow(0, channels, channels).copy_(variance);
    own.narrow(0, 2 * channels, 1).fill_(values);
  }
  const at::Tensor everyone = ranks.gather(own);
  const at::Tensor means = everyone.narrow(1, 0, channels), variances = everyone.narrow(1, channels, channels);
  const at::Tensor counts = everyone.narrow(1, 2 * channels, 1), count = counts.sum();
  const at::Tensor mean = (means * counts).sum(0) / count;
  return {mean, ((variances + (means - mean).square()) * counts).sum(0) / count, count};
}

class Synchronized : public torch::autograd::Function<Synchronized> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                               const at::Tensor& bias, double eps, const distributed::Ranks& ranks) {
    const auto [mean, variance, count] = statistics(x, ranks);
    const at::Tensor inverse = (variance + eps).rsqrt();
    const at::Tensor y = batch_norm_affine(x, mean, weight * inverse, bias.to(at::kDouble));
    const at::Tensor unbiased = (variance * count / (count - 1).clamp_min(1)).to(weight.scalar_type());
    const at::Tensor own_mean = mean.to(weight.scalar_type());
    ctx->save_for_backward({x, weight, mean, inverse, count});
    ctx->saved_data["group"] = ranks.group();
    ctx->mark_non_differentiable({own_mean, unbiased});
    return {y, own_mean, unbiased};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &mean = saved[2], &inverse = saved[3], &count = saved[4];
    const distributed::Ranks ranks(ctx->saved_data["group"].toCustomClass<c10d::ProcessGroup>());
    auto [grad_bias, grad_weight] = batch_norm_grad_sums(grads[0], x, mean);
    grad_weight = grad_weight * inverse;
    // The parameters' gradients stay this rank's own: like all others, they are averaged after the backward pass.
    const at::Tensor sums = at::cat({grad_bias, grad_weight});
    ranks.sum_(sums);
    const auto means = (sums / count).chunk(2);
    const at::Tensor scale = weight * inverse;
    const at::Tensor grad_x = batch_norm_grad_input(grads[0], x, mean, means[0], scale, scale * inverse * means[1]);
    const auto type = weight.scalar_type();
    return {grad_x, grad_weight.to(type), grad_bias.to(type), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> synchronized_batch_norm(const at::Tensor& x, const at::Tensor& weight,
                                                                       const at::Tensor& bias, double eps,
                                                                       const distributed::Ranks& ranks) {
  const variable_list results = Synchronized::apply(x, weight, bias, eps, ranks);
  return {results[0], results[1], results[2]};
}

}  // namespace cctorch::nn
