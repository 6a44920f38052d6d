#pragma once

#include <cctorch/plan.h>
#include <torch/nn/init.h>
#include <torch/nn/module.h>
#include <torch/nn/options/conv.h>
#include <torch/types.h>

#include <cmath>
#include <variant>
#include <vector>

// What the layers and the low-rank modules share.
namespace cctorch::nn {

inline torch::ExpandingArray<2> numeric_padding(const torch::nn::Conv2dOptions& options) {
  const auto* padding = std::get_if<torch::ExpandingArray<2>>(&options.padding());
  TORCH_CHECK_VALUE(padding != nullptr && std::holds_alternative<torch::enumtype::kZeros>(options.padding_mode()),
                    "padding: expected zero padding given in numbers; compute those of \"same\" from the kernel size");
  return *padding;
}

// PyTorch's default initialization: uniform within 1 / sqrt(fan_in), for `weight` and for the `bias` added to its
// result.
inline void initialize_uniform(at::Tensor& weight, at::Tensor* bias) {
  const torch::NoGradGuard no_grad;
  torch::nn::init::kaiming_uniform_(weight, std::sqrt(5.0));
  if (bias == nullptr || !bias->defined()) return;
  const int64_t fan_in = weight.numel() / weight.size(0);
  const double bound = 1.0 / std::sqrt(static_cast<double>(fan_in));
  torch::nn::init::uniform_(*bias, -bound, bound);
}

// `bias` at every position of a tensor of `sizes` along `dimension`; no channels at all where it is undefined. In the
// layout of x, or in that of `like` where x has no channels.
inline at::Tensor constant_of(const at::Tensor& bias, const at::Tensor& x, std::vector<int64_t> sizes,
                              int64_t dimension, at::MemoryFormat like) {
  sizes[dimension] = bias.defined() ? bias.size(0) : 0;
  const bool told = x.numel() == 0 && like == at::MemoryFormat::ChannelsLast;
  const bool channels_last = sizes.size() == 4 && (told || x.stride(1) == 1);
  const at::MemoryFormat format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  if (!bias.defined()) return at::empty(sizes, x.options().memory_format(format));
  std::vector<int64_t> broadcast(sizes.size(), 1);
  broadcast[dimension] = sizes[dimension];
  // Networks change what a layer gives in place, and a view of the bias can't be.
  return bias.to(x.scalar_type()).view(broadcast).expand(sizes).clone(format);
}

// Throws c10::ValueError where `found`, of the dense layer, is of another kind or has other channels than `plan` says.
void check_architecture(const LayerPlan& plan, const LayerSpec& found);

}  // namespace cctorch::nn
