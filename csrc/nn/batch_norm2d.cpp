#include <cctorch/nn/layers.h>

#include <ostream>

#include "csrc/nn/layer_parts.h"

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
  if (observing_) positions_ = x.size(-2) * x.size(-1);
  return BatchNormImplBase::forward(x);
}

void BatchNorm2dImpl::check_structure(const LayerPlan&) const {}

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
}

}  // namespace cctorch::nn
