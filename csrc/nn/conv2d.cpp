#include <ATen/ops/conv2d.h>
#include <cctorch/low_rank.h>
#include <cctorch/nn/factors.h>
#include <cctorch/nn/layers.h>

#include <ostream>
#include <utility>
#include <vector>

#include "csrc/nn/layer_parts.h"

namespace cctorch::nn {

Conv2dImpl::Conv2dImpl(int64_t in_channels, int64_t out_channels, torch::ExpandingArray<2> kernel_size)
    : Conv2dImpl(torch::nn::Conv2dOptions(in_channels, out_channels, kernel_size)) {}

Conv2dImpl::Conv2dImpl(const torch::nn::Conv2dOptions& options_) : options(options_) {
  TORCH_CHECK_VALUE(options.in_channels() >= 1 && options.out_channels() >= 1, "channels = ", options.in_channels(),
                    " -> ", options.out_channels(), ", expected at least 1 of each");
  TORCH_CHECK_VALUE(options.groups() > 0 && options.in_channels() % options.groups() == 0 &&
                        options.out_channels() % options.groups() == 0,
                    "groups = ", options.groups(), ", expected a divisor of in_channels = ", options.in_channels(),
                    " and of out_channels = ", options.out_channels());
  numeric_padding(options);
  Conv2dImpl::reset();
}

bool Conv2dImpl::depthwise() const {
  return options.groups() > 1 && options.groups() == options.in_channels() &&
         options.in_channels() == options.out_channels();
}

void Conv2dImpl::reset() {
  const int64_t out = plan_ ? static_cast<int64_t>(plan_->kept_out.size()) : options.out_channels();
  const int64_t in = reads_nothing() ? 0
                     : depthwise()   ? 1
                     : plan_         ? static_cast<int64_t>(plan_->kept_in.size()) / options.groups()
                                     : options.in_channels() / options.groups();
  const auto& kernel = *options.kernel_size();
  register_parameters(out, in, kernel, options.bias());
  reset_parameters();
}

void Conv2dImpl::pretty_print(std::ostream& stream) const {
  stream << "cctorch::nn::Conv2d(" << options.in_channels() << ", " << options.out_channels()
         << ", kernel_size=" << options.kernel_size() << ", stride=" << options.stride()
         << ", padding=" << numeric_padding(options) << ", dilation=" << options.dilation()
         << ", groups=" << options.groups() << ", bias=" << std::boolalpha << options.bias() << ")";
  print_plan(stream);
}

LayerSpec Conv2dImpl::spec(const std::string& name) const {
  const auto& kernel = *options.kernel_size();
  return {.name = name,
          .kind = depthwise() ? LayerKind::depthwise_conv2d : LayerKind::conv2d,
          .in_channels = options.in_channels(),
          .out_channels = options.out_channels(),
          .kernel_height = kernel[0],
          .kernel_width = kernel[1],
          .positions = positions_,
          .groups = options.groups(),
          .bits = stored_bits(),
          .stride_height = (*options.stride())[0],
          .stride_width = (*options.stride())[1]};
}

at::Tensor Conv2dImpl::constant(const at::Tensor& x) const {
  std::vector<int64_t> sizes = x.sizes().vec();
  TORCH_CHECK_VALUE(sizes.size() == 4, "Conv2d: x has ", sizes.size(),
                    " dimensions, expected 4 (batch x channels x height x width)");
  const torch::ExpandingArray<2> padding = numeric_padding(options);
  for (size_t side = 0; side < 2; ++side) {
    const int64_t reach = (*options.dilation())[side] * ((*options.kernel_size())[side] - 1) + 1;
    sizes[2 + side] = (sizes[2 + side] + 2 * (*padding)[side] - reach) / (*options.stride())[side] + 1;
  }
  return constant_of(bias, x, std::move(sizes), 1, format_);
}

at::Tensor Conv2dImpl::forward(const at::Tensor& x) {
  const at::Tensor input = gathered(x, 1);
  if (watcher_ != nullptr) watcher_->reads(*this, x, input);
  const torch::ExpandingArray<2> padding = numeric_padding(options);
  at::Tensor y;
  if (reads_nothing()) {
    y = constant(x);
  } else if (weight.defined()) {
    const int64_t groups = depthwise() ? weight.size(0) : options.groups();
    y = at::conv2d(input, constrained(weight), bias, options.stride(), padding, options.dilation(), groups);
  } else {
    const auto offset = bias.defined() ? std::optional(bias) : std::nullopt;
    y = core.defined() ? tucker2_conv2d(input, constrained(first), constrained(core), constrained(second), offset,
                                        options.stride(), padding, options.dilation())
                       : low_rank_conv2d(input, constrained(first), constrained(second), offset, options.stride(),
                                         padding, options.dilation());
  }
  if (observing_) positions_ += y.size(-2) * y.size(-1);
  if (watcher_ != nullptr) watcher_->gives(*this, input, y);
  return y;
}

void Conv2dImpl::check_structure(const LayerPlan& plan) const {
  check_rank(plan, *options.kernel_size());
  TORCH_CHECK_VALUE(options.groups() == 1 || depthwise() || plan.keeps_shape() || plan.reads_nothing(), "layer '",
                    plan.name, "' is a convolution with groups = ", options.groups(),
                    ", which stays as it is, but the plan removes channels or factors it: leave it out of the plan");
}

}  // namespace cctorch::nn
