#include <cctorch/low_rank.h>
#include <cctorch/nn/modules.h>
#include <torch/types.h>

#include <algorithm>
#include <ostream>

#include "csrc/nn/layer_parts.h"

namespace cctorch::nn {

namespace {

void check_rank(int64_t rank, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(rank >= 1 && rank <= std::min(rows, columns), "rank = ", rank, ", expected 1 to ",
                    std::min(rows, columns), ", the most that a weight of ", rows, " x ", columns, " can have");
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

LowRankConv2dImpl::LowRankConv2dImpl(const torch::nn::Conv2dOptions& options_, int64_t rank)
    : options(options_), rank_(rank) {
  TORCH_CHECK_VALUE(options.groups() == 1, "groups = ", options.groups(), ", expected 1");
  numeric_padding(options);
  const auto& kernel = *options.kernel_size();
  check_rank(rank, options.out_channels(), options.in_channels() * kernel[0] * kernel[1]);
  LowRankConv2dImpl::reset();
}

void LowRankConv2dImpl::reset() {
  const auto& kernel = *options.kernel_size();
  first = register_parameter("first", torch::empty({rank_, options.in_channels(), kernel[0], kernel[1]}));
  second = register_parameter("second", torch::empty({options.out_channels(), rank_, 1, 1}));
  if (options.bias()) bias = register_parameter("bias", torch::empty({options.out_channels()}));
  reset_parameters();
}

void LowRankConv2dImpl::reset_parameters() {
  initialize_uniform(first, nullptr);
  initialize_uniform(second, &bias);
}

void LowRankConv2dImpl::pretty_print(std::ostream& stream) const {
  stream << "cctorch::nn::LowRankConv2d(" << options.in_channels() << ", " << options.out_channels()
         << ", kernel_size=" << options.kernel_size() << ", rank=" << rank_ << ", stride=" << options.stride() << ")";
}

at::Tensor LowRankConv2dImpl::forward(const at::Tensor& x) {
  return low_rank_conv2d(x, first, second, optional(bias), options.stride(), numeric_padding(options),
                         options.dilation());
}

}  // namespace cctorch::nn
