#include <cctorch/nn/layers.h>

#include <ostream>

#include "csrc/nn/layer_parts.h"
#include "csrc/nn/synchronized_batch_norm.h"

namespace cctorch::nn {

void BatchNorm2dImpl::_check_input_dim(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4, "BatchNorm2d: x has ", x.dim(),
                    " dimensions, expected 4 (batch x channels x height x width)");
}

void BatchNorm2dImpl::pretty_print(std::ostream& stream) const {
  stream << "cctorch::nn::BatchNorm2d(" << options.num_features() << ", eps=" << options.eps() << ")";
}

LayerSpec BatchNorm2dImpl::spec(const std::string& name) const {
  const int64_t channels = plan_ ? plan_->out_channels : options.num_features();
  return {.name = name,
          .kind = LayerKind::batch_norm2d,
          .in_channels = channels,
          .out_channels = channels,
          .positions = positions_};
}

at::Tensor BatchNorm2dImpl::forward(const at::Tensor& x) {
  if (observing_) positions_ += x.size(-2) * x.size(-1);
  if (watcher_ != nullptr) watcher_->reads(*this, x, x);
  const at::Tensor y = compute(x);
  if (watcher_ != nullptr) watcher_->gives(*this, x, y);
  return y;
}

at::Tensor BatchNorm2dImpl::compute(const at::Tensor& x) {
  if (plan_ && plan_->reads_nothing()) return constant_of(bias, x, x.sizes().vec(), 1, format_);
  if (is_training() && ranks_.count() > 1) return synchronized_forward(x);
  return BatchNormImplBase::forward(x);
}

at::Tensor BatchNorm2dImpl::synchronized_forward(const at::Tensor& x) {
  _check_input_dim(x);
  const at::Tensor scale = weight.defined() ? weight : x.new_ones(x.size(1));
  const at::Tensor shift = bias.defined() ? bias : x.new_zeros(x.size(1));
  const auto [y, mean, variance] = synchronized_batch_norm(x, scale, shift, options.eps(), ranks_);
  if (options.track_running_stats()) {
    const torch::NoGradGuard no_grad;
    num_batches_tracked += 1;
    const double share =
        options.momentum().has_value() ? *options.momentum() : 1.0 / num_batches_tracked.item<double>();
    running_mean.lerp_(mean, share);
    running_var.lerp_(variance, share);
  }
  return y;
}

void BatchNorm2dImpl::check_structure(const LayerPlan&) const {}

void BatchNorm2dImpl::reset() {
  BatchNormImplBase::reset();
  if (plan_ && plan_->reads_nothing()) leave_bias_only();
}

void BatchNorm2dImpl::leave_bias_only() {
  // A weight that nothing uses would wait for a gradient.
  const bool requires_grad = !bias.defined() || bias.requires_grad();
  const at::TensorOptions like = running_mean.defined() ? running_mean.options() : at::TensorOptions();
  const at::Tensor left = bias.defined() ? bias.detach() : at::zeros(options.num_features(), like);
  parameters_.clear();
  weight = bias = at::Tensor();
  if (options.num_features() > 0) bias = register_parameter("bias", left, requires_grad);
}

void BatchNorm2dImpl::carry_out(const LayerPlan& plan) {
  const torch::NoGradGuard no_grad;
  plan_ = plan;
  options.num_features(static_cast<int64_t>(plan.kept_out.size()));
  for (at::Tensor* parameter : {&weight, &bias}) {
    if (!parameter->defined()) continue;
    const char* const name = parameter == &weight ? "weight" : "bias";
    parameters_[name] = narrow(*parameter, plan).set_requires_grad(parameter->requires_grad());
    *parameter = parameters_[name];
  }
  for (at::Tensor* statistic : {&running_mean, &running_var}) {
    if (statistic->defined()) statistic->set_data(narrow(*statistic, plan));
  }
  if (plan.reads_nothing()) leave_bias_only();
}

}  // namespace cctorch::nn
