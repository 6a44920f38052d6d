#include <cctorch/channel_gate.h>
#include <cctorch/mask.h>
#include <cctorch/nn/modules.h>
#include <torch/types.h>

#include <ostream>
#include <utility>

namespace cctorch::nn {

ChannelGateImpl::ChannelGateImpl(int64_t channels) : channels_(channels) {
  TORCH_CHECK_VALUE(channels >= 1, "channels = ", channels, ", expected at least 1");
  ChannelGateImpl::reset();
}

void ChannelGateImpl::reset() { gate = register_parameter("gate", torch::ones({channels_})); }

void ChannelGateImpl::pretty_print(std::ostream& stream) const {
  stream << "cctorch::nn::ChannelGate(" << channels_ << ")";
}

at::Tensor ChannelGateImpl::forward(const at::Tensor& x) { return channel_gate(x, gate); }

MaskImpl::MaskImpl(at::Tensor mask_) : mask(std::move(mask_)) {
  TORCH_CHECK_TYPE(mask.scalar_type() == torch::kBool, "mask is of type ", mask.scalar_type(), ", expected bool");
  MaskImpl::reset();
}

void MaskImpl::reset() { mask = register_buffer("mask", mask.clone()); }

void MaskImpl::pretty_print(std::ostream& stream) const { stream << "cctorch::nn::Mask(" << mask.sizes() << ")"; }

at::Tensor MaskImpl::forward(const at::Tensor& weight) {
  // Module::to(dtype) converts boolean buffers too.
  return apply_mask(weight, mask.to(torch::kBool));
}

}  // namespace cctorch::nn
