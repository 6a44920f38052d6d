#include <cctorch/channel_gate.h>
#include <cctorch/gates.h>
#include <cctorch/nn/modules.h>
#include <cctorch/soft_threshold.h>
#include <torch/types.h>

#include <cmath>
#include <ostream>

namespace cctorch::nn {
namespace {

double logit(double probability) { return std::log(probability / (1 - probability)); }

}  // namespace

SoftThresholdImpl::SoftThresholdImpl(double threshold, std::optional<int64_t> axis, int64_t channels)
    : threshold_(threshold), axis_(axis), channels_(channels) {
  TORCH_CHECK_VALUE(0 < threshold && threshold < 1, "threshold = ", threshold, ", expected a number between 0 and 1");
  TORCH_CHECK_VALUE(channels >= 1, "channels = ", channels, ", expected at least 1");
  TORCH_CHECK_VALUE(axis || channels == 1, "channels = ", channels, " without axis, expected 1");
  SoftThresholdImpl::reset();
}

void SoftThresholdImpl::reset() { s = register_parameter("s", torch::full({channels_}, logit(threshold_))); }

void SoftThresholdImpl::pretty_print(std::ostream& stream) const {
  stream << "cctorch::nn::SoftThreshold(" << channels_ << ")";
}

at::Tensor SoftThresholdImpl::forward(const at::Tensor& weight) {
  const auto type = weight.scalar_type() == torch::kDouble ? torch::kDouble : torch::kFloat;
  return soft_threshold(weight, torch::sigmoid(s.to(type)), axis_);
}

HardConcreteGateImpl::HardConcreteGateImpl(int64_t channels, double open) : channels_(channels), open_(open) {
  TORCH_CHECK_VALUE(channels >= 1, "channels = ", channels, ", expected at least 1");
  TORCH_CHECK_VALUE(0 < open && open < 1, "open = ", open, ", expected a probability between 0 and 1");
  HardConcreteGateImpl::reset();
}

void HardConcreteGateImpl::reset() {
  const auto at_zero = hard_concrete_open(torch::zeros({}, torch::kDouble)).item<double>();
  log_alpha = register_parameter("log_alpha", torch::full({channels_}, logit(open_) - logit(at_zero)));
}

void HardConcreteGateImpl::pretty_print(std::ostream& stream) const {
  stream << "cctorch::nn::HardConcreteGate(" << channels_ << ")";
}

at::Tensor HardConcreteGateImpl::forward(const at::Tensor& x) {
  return channel_gate(x, hard_concrete(log_alpha, is_training()));
}

at::Tensor HardConcreteGateImpl::expected_l0() const { return hard_concrete_open(log_alpha).sum(); }

}  // namespace cctorch::nn
