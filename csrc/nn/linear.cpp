#include <ATen/ops/linear.h>
#include <cctorch/low_rank.h>
#include <cctorch/nn/factors.h>
#include <cctorch/nn/layers.h>

#include <ostream>

#include "csrc/nn/layer_parts.h"

namespace cctorch::nn {

LinearImpl::LinearImpl(int64_t in_features, int64_t out_features)
    : LinearImpl(torch::nn::LinearOptions(in_features, out_features)) {}

LinearImpl::LinearImpl(const torch::nn::LinearOptions& options_) : options(options_) { LinearImpl::reset(); }

void LinearImpl::reset() {
  const int64_t out = plan_ ? static_cast<int64_t>(plan_->kept_out.size()) : options.out_features();
  const int64_t in = plan_ ? static_cast<int64_t>(plan_->kept_in.size()) : options.in_features();
  register_parameters(out, in, {}, options.bias());
  reset_parameters();
}

void LinearImpl::pretty_print(std::ostream& stream) const {
  stream << "cctorch::nn::Linear(in_features=" << options.in_features() << ", out_features=" << options.out_features()
         << ", bias=" << std::boolalpha << options.bias() << ")";
  print_plan(stream);
}

LayerSpec LinearImpl::spec(const std::string& name) const {
  return {.name = name,
          .kind = LayerKind::linear,
          .in_channels = options.in_features(),
          .out_channels = options.out_features(),
          .positions = positions_,
          .bits = stored_bits()};
}

at::Tensor LinearImpl::forward(const at::Tensor& x) {
  const at::Tensor input = gathered(x, -1);
  if (watcher_ != nullptr) watcher_->reads(*this, x, input);
  const auto optional_bias = bias.defined() ? std::optional(bias) : std::nullopt;
  at::Tensor y;
  if (reads_nothing()) {
    TORCH_CHECK_VALUE(x.dim() > 0, "Linear: x has no dimension, expected at least 1 (... x features)");
    y = constant_of(bias, x, x.sizes().vec(), x.dim() - 1, at::MemoryFormat::Contiguous);
  } else {
    y = weight.defined() ? at::linear(input, constrained(weight), optional_bias)
                         : low_rank_linear(input, constrained(first), constrained(second), optional_bias);
  }
  if (observing_) positions_ += y.dim() < 2 ? 1 : y.numel() / (y.size(0) * y.size(-1));
  if (watcher_ != nullptr) watcher_->gives(*this, input, y);
  return y;
}

void LinearImpl::check_structure(const LayerPlan& plan) const { check_rank(plan, {}); }

}  // namespace cctorch::nn
