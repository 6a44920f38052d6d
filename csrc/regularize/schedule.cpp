#include <ATen/core/Tensor.h>
#include <cctorch/regularize.h>

#include <algorithm>
#include <cmath>

#include "csrc/regularize/state.h"

namespace cctorch::regularize {

namespace {

void check_period(const char* who, const char* argument, int64_t period) {
  TORCH_CHECK_VALUE(period >= 1, who, ": ", argument, " = ", period, ", expected at least 1 step");
}

// `steps` may be infinite or NaN (0 / 0: no learning rate, nothing asked for).
int64_t clamped(double steps, int64_t minimum, int64_t maximum) {
  if (!(steps < static_cast<double>(maximum))) return maximum;
  return std::max(minimum, static_cast<int64_t>(std::round(steps)));
}

}  // namespace

ConstantPeriod::ConstantPeriod(int64_t period) : period_(period) { check_period("ConstantPeriod", "period", period); }

StepwisePeriod::StepwisePeriod(std::vector<std::pair<int64_t, int64_t>> periods) : periods_(std::move(periods)) {
  TORCH_CHECK_VALUE(!periods_.empty() && periods_.front().first == 0,
                    "StepwisePeriod: ", periods_.empty() ? "no period" : "the first step is not 0",
                    ", expected (step, period) pairs that begin at step 0");
  for (size_t i = 0; i < periods_.size(); ++i) {
    check_period("StepwisePeriod", "period", periods_[i].second);
    TORCH_CHECK_VALUE(i == 0 || periods_[i - 1].first < periods_[i].first, "StepwisePeriod: step ", periods_[i].first,
                      " follows step ", periods_[i - 1].first, ", expected ascending steps");
  }
}

int64_t StepwisePeriod::period(int64_t step, std::optional<double>) const {
  const auto after = std::upper_bound(periods_.begin(), periods_.end(), step,
                                      [](int64_t s, const auto& entry) { return s < entry.first; });
  return std::prev(std::max(after, periods_.begin() + 1))->second;
}

InverseLearningRate::InverseLearningRate(double product, int64_t maximum) : product_(product), maximum_(maximum) {
  TORCH_CHECK_VALUE(product > 0 && std::isfinite(product), "InverseLearningRate: product = ", product,
                    ", expected learning rate times period, a finite number above 0");
  check_period("InverseLearningRate", "maximum", maximum);
}

int64_t InverseLearningRate::period(int64_t, std::optional<double> lr) const {
  TORCH_CHECK_VALUE(lr,
                    "InverseLearningRate: the learning rate is unknown; give the events the optimizer, or pass it "
                    "to step");
  TORCH_CHECK_VALUE(*lr >= 0, "InverseLearningRate: lr = ", *lr, ", expected at least 0");
  return clamped(product_ / *lr, 1, maximum_);
}

AdaptivePeriod::AdaptivePeriod(double strength, int64_t minimum, int64_t maximum)
    : strength_(strength), minimum_(minimum), maximum_(maximum), period_(minimum) {
  TORCH_CHECK_VALUE(strength > 0 && std::isfinite(strength), "AdaptivePeriod: strength = ", strength,
                    ", expected the relative update per mini-batch, a finite number above 0");
  check_period("AdaptivePeriod", "minimum", minimum);
  TORCH_CHECK_VALUE(maximum >= minimum, "AdaptivePeriod: maximum = ", maximum,
                    ", expected at least minimum = ", minimum);
}

void AdaptivePeriod::record(double relative_update) {
  period_ = clamped(relative_update / strength_, minimum_, maximum_);
}

State AdaptivePeriod::state_dict() const { return {{"period", period_}}; }

void AdaptivePeriod::load_state_dict(const State& state) {
  const auto period = read<int64_t>(state, "period");
  check_period("AdaptivePeriod", "period", period);
  period_ = period;
}

}  // namespace cctorch::regularize
