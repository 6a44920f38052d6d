#include <cctorch/collaborative.h>
#include <cctorch/low_rank.h>
#include <cctorch/nn/modules.h>
#include <torch/types.h>

#include <algorithm>
#include <numeric>
#include <ostream>
#include <utility>
#include <vector>

#include "csrc/nn/layer_parts.h"

namespace cctorch::nn {

namespace {

void check_rank(int64_t rank, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(rank >= 1 && rank <= std::min(rows, columns), "rank = ", rank, ", expected 1 to ",
                    std::min(rows, columns), ", the most that a weight of ", rows, " x ", columns, " can have");
}

void check_weight(const at::Tensor& weight, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(weight.sizes() == sizes, "factorize: weight has shape ", weight.sizes(), ", expected ", sizes,
                    ", that of the dense layer");
}

std::vector<int64_t> all_of(int64_t size) {
  std::vector<int64_t> indices(size);
  std::iota(indices.begin(), indices.end(), 0);
  return indices;
}

void assign(at::Tensor& parameter, const at::Tensor& value) {
  const torch::NoGradGuard no_grad;
  parameter.copy_(value);
}

std::optional<at::Tensor> optional(const at::Tensor& bias) {
  return bias.defined() ? std::optional(bias) : std::nullopt;
}

}  // namespace

LowRankLinearImpl::LowRankLinearImpl(const LowRankLinearOptions& options_) : options(options_) {
  check_rank(options.rank(), options.out_features(), options.in_features());
  LowRankLinearImpl::reset();
}

void LowRankLinearImpl::reset() {
  first = register_parameter("first", torch::empty({options.rank(), options.in_features()}));
  second = register_parameter("second", torch::empty({options.out_features(), options.rank()}));
  if (options.bias()) bias = register_parameter("bias", torch::empty({options.out_features()}));
  reset_parameters();
}

void LowRankLinearImpl::reset_parameters() {
  initialize_uniform(first, nullptr);
  initialize_uniform(second, &bias);
}

void LowRankLinearImpl::pretty_print(std::ostream& stream) const {
  stream << "cctorch::nn::LowRankLinear(in_features=" << options.in_features()
         << ", out_features=" << options.out_features() << ", rank=" << options.rank() << ", bias=" << std::boolalpha
         << options.bias() << ")";
}

at::Tensor LowRankLinearImpl::forward(const at::Tensor& x) { return low_rank_linear(x, first, second, optional(bias)); }

void LowRankLinearImpl::factorize(const at::Tensor& weight) {
  check_weight(weight, {options.out_features(), options.in_features()});
  const auto [inner, outer] = collaborative::factorize(weight, all_of(options.in_features()), options.rank());
  assign(first, inner);
  assign(second, outer);
}

LowRankConv2dImpl::LowRankConv2dImpl(const torch::nn::Conv2dOptions& options_, int64_t rank, LowRankLayout layout)
    : options(options_), rank_(rank), layout_(layout) {
  check();
  const auto& kernel = *options.kernel_size();
  const bool spatial = layout == LowRankLayout::spatial;
  check_rank(rank, options.out_channels() * (spatial ? kernel[0] : 1),
             options.in_channels() * (spatial ? 1 : kernel[0]) * kernel[1]);
  LowRankConv2dImpl::reset();
}

LowRankConv2dImpl::LowRankConv2dImpl(const torch::nn::Conv2dOptions& options_, std::pair<int64_t, int64_t> ranks)
    : options(options_), rank_(ranks.first), ranks_(ranks) {
  check();
  TORCH_CHECK_VALUE(1 <= ranks.first && ranks.first <= options.out_channels() && 1 <= ranks.second &&
                        ranks.second <= options.in_channels(),
                    "ranks = ", ranks.first, ", ", ranks.second, ", expected 1 to ", options.out_channels(),
                    " output and 1 to ", options.in_channels(), " input channels");
  LowRankConv2dImpl::reset();
}

void LowRankConv2dImpl::check() const {
  TORCH_CHECK_VALUE(options.groups() == 1, "groups = ", options.groups(), ", expected 1");
  numeric_padding(options);
}

void LowRankConv2dImpl::reset() {
  const auto& kernel = *options.kernel_size();
  const bool spatial = layout_ == LowRankLayout::spatial;
  const int64_t inner = ranks_ ? ranks_->second : rank_;
  first = register_parameter(
      "first", torch::empty({inner, options.in_channels(), spatial || ranks_ ? 1 : kernel[0], ranks_ ? 1 : kernel[1]}));
  if (ranks_) core = register_parameter("core", torch::empty({rank_, inner, kernel[0], kernel[1]}));
  second = register_parameter("second", torch::empty({options.out_channels(), rank_, spatial ? kernel[0] : 1, 1}));
  if (options.bias()) bias = register_parameter("bias", torch::empty({options.out_channels()}));
  reset_parameters();
}

void LowRankConv2dImpl::reset_parameters() {
  initialize_uniform(first, nullptr);
  if (core.defined()) initialize_uniform(core, nullptr);
  initialize_uniform(second, &bias);
}

void LowRankConv2dImpl::pretty_print(std::ostream& stream) const {
  stream << "cctorch::nn::LowRankConv2d(" << options.in_channels() << ", " << options.out_channels()
         << ", kernel_size=" << options.kernel_size();
  if (ranks_) {
    stream << ", ranks=" << ranks_->first << "," << ranks_->second;
  } else {
    stream << ", rank=" << rank_ << (layout_ == LowRankLayout::spatial ? ", layout=spatial" : "");
  }
  stream << ", stride=" << options.stride() << ")";
}

at::Tensor LowRankConv2dImpl::forward(const at::Tensor& x) {
  const auto padding = numeric_padding(options);
  return ranks_ ? tucker2_conv2d(x, first, core, second, optional(bias), options.stride(), padding, options.dilation())
                : low_rank_conv2d(x, first, second, optional(bias), options.stride(), padding, options.dilation());
}

void LowRankConv2dImpl::factorize(const at::Tensor& weight) {
  const auto& kernel = *options.kernel_size();
  const int64_t out = options.out_channels(), in = options.in_channels();
  check_weight(weight, {out, in, kernel[0], kernel[1]});
  if (ranks_) {
    const auto [cores, outer, inner] = tucker2(weight.detach(), ranks_->first, ranks_->second);
    assign(first, inner[0].t().unsqueeze(-1).unsqueeze(-1));
    assign(core, cores[0]);
    assign(second, outer[0].unsqueeze(-1).unsqueeze(-1));
  } else if (layout_ == LowRankLayout::spatial) {
    const at::Tensor matrix = weight.permute({0, 2, 1, 3}).reshape({out * kernel[0], in * kernel[1]});
    const auto [inner, outer] = collaborative::factorize(matrix, all_of(matrix.size(1)), rank_);
    assign(first, inner.view({rank_, in, 1, kernel[1]}));
    assign(second, outer.view({out, kernel[0], rank_, 1}).transpose(1, 2));
  } else {
    const auto [inner, outer] = collaborative::factorize(weight, all_of(in), rank_);
    assign(first, inner);
    assign(second, outer);
  }
}

}  // namespace cctorch::nn
