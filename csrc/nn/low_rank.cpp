#include <cctorch/collaborative.h>
#include <cctorch/low_rank.h>
#include <cctorch/nn/factors.h>
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

LowRankConv2dImpl::LowRankConv2dImpl(const torch::nn::Conv2dOptions& options_, LowRankLayout layout, int64_t rank,
                                     std::optional<int64_t> rank_in)
    : options(options_) {
  TORCH_CHECK_VALUE(options.groups() == 1, "groups = ", options.groups(), ", expected 1");
  numeric_padding(options);
  form_ = LayerPlan::unchanged("LowRankConv2d", LayerKind::conv2d, options.in_channels(), options.out_channels());
  form_.rank = rank;
  form_.layout = layout;
  form_.rank_in = rank_in;
  CompressionPlan{.method = "", .target = 0.0, .layers = {form_}}.validate();
  cctorch::nn::check_rank(form_, *options.kernel_size());
  LowRankConv2dImpl::reset();
}

LowRankConv2dImpl::LowRankConv2dImpl(const torch::nn::Conv2dOptions& options, int64_t rank, LowRankLayout layout)
    : LowRankConv2dImpl(options, layout, rank, std::nullopt) {}

LowRankConv2dImpl::LowRankConv2dImpl(const torch::nn::Conv2dOptions& options, std::pair<int64_t, int64_t> ranks)
    : LowRankConv2dImpl(options, LowRankLayout::tucker, ranks.first, ranks.second) {}

void LowRankConv2dImpl::reset() {
  const Factors empty = empty_factors(form_, options.out_channels(), options.in_channels(), *options.kernel_size());
  first = register_parameter("first", empty.first);
  if (empty.core.defined()) core = register_parameter("core", empty.core);
  second = register_parameter("second", empty.second);
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
  if (form_.rank_in) {
    stream << ", ranks=" << form_.rank.value_or(0) << "," << *form_.rank_in;
  } else {
    stream << ", rank=" << form_.rank.value_or(0) << (form_.layout == LowRankLayout::spatial ? ", layout=spatial" : "");
  }
  stream << ", stride=" << options.stride() << ")";
}

at::Tensor LowRankConv2dImpl::forward(const at::Tensor& x) {
  const auto padding = numeric_padding(options);
  return core.defined()
             ? tucker2_conv2d(x, first, core, second, optional(bias), options.stride(), padding, options.dilation())
             : low_rank_conv2d(x, first, second, optional(bias), options.stride(), padding, options.dilation());
}

void LowRankConv2dImpl::factorize(const at::Tensor& weight) {
  const auto& kernel = *options.kernel_size();
  check_weight(weight, {options.out_channels(), options.in_channels(), kernel[0], kernel[1]});
  const Factors factors = cctorch::nn::factorize(weight, form_);
  assign(first, factors.first);
  if (core.defined()) assign(core, factors.core);
  assign(second, factors.second);
}

}  // namespace cctorch::nn
