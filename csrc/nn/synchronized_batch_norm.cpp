#include "csrc/nn/synchronized_batch_norm.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>
#include <torch/types.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <array>

namespace cctorch::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr std::array<int64_t, 3> reduced = {0, 2, 3};

at::Tensor spread(const at::Tensor& values) { return values.view({1, -1, 1, 1}); }

struct Statistics {
  at::Tensor mean, variance, count;
};

// Over all ranks, in float64: their moments add up, around the common mean. The variance is the biased one.
Statistics statistics(const at::Tensor& x, const distributed::Ranks& ranks) {
  const int64_t channels = x.size(1), values = x.numel() / channels;
  at::Tensor own = at::zeros({2 * channels + 1}, x.options().dtype(at::kDouble));
  if (values > 0) {
    const at::Tensor wide = x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
    const auto [variance, mean] = at::var_mean(wide, reduced, /*correction=*/0);
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
    const auto [wide_mean, variance, count] = statistics(x, ranks);
    const at::Tensor inverse = (variance + eps).rsqrt().to(weight.scalar_type());
    const at::Tensor mean = wide_mean.to(weight.scalar_type());
    const at::Tensor scale = weight * inverse;
    const at::Tensor y = at::addcmul(spread(bias - mean * scale), x, spread(scale)).to(x.scalar_type());
    const at::Tensor unbiased = (variance * count / (count - 1).clamp_min(1)).to(weight.scalar_type());
    ctx->save_for_backward({x, weight, mean, inverse, count});
    ctx->saved_data["group"] = ranks.group();
    ctx->mark_non_differentiable({mean, unbiased});
    return {y, mean, unbiased};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &mean = saved[2], &inverse = saved[3], &count = saved[4];
    const distributed::Ranks ranks(ctx->saved_data["group"].toCustomClass<c10d::ProcessGroup>());
    const at::Tensor grad = grads[0].to(weight.scalar_type());
    const at::Tensor grad_bias = grad.sum(reduced);
    const at::Tensor grad_weight = (grad * (x - spread(mean))).sum(reduced) * inverse;
    // The parameters' gradients stay this rank's own: like all others, they are averaged after the backward pass.
    const at::Tensor sums = at::cat({grad_bias, grad_weight});
    ranks.sum_(sums);
    const auto means = (sums / count).to(weight.scalar_type()).chunk(2);
    const at::Tensor scale = weight * inverse;
    const at::Tensor slope = -scale * inverse * means[1];
    const at::Tensor shift = -scale * means[0] - slope * mean;
    const at::Tensor grad_x = at::addcmul(spread(shift), x, spread(slope)).addcmul_(grad, spread(scale));
    return {grad_x.to(x.scalar_type()), grad_weight, grad_bias, at::Tensor(), at::Tensor()};
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
