#include <ATen/ATen.h>
#include <cctorch/regularize.h>

#include <cmath>

#include "csrc/regularize/state.h"

namespace cctorch::regularize {

WeightDecay::WeightDecay(double strength) : strength_(strength) {
  TORCH_CHECK_VALUE(0 <= strength && strength <= 1, "WeightDecay: strength = ", strength, ", expected 0 to 1");
}

void WeightDecay::replace(std::vector<Weight>& weights) {
  std::vector<at::Tensor> values;
  for (const Weight& weight : weights) values.push_back(weight.value);
  values = at::_foreach_mul(values, 1 - strength_);
  for (size_t i = 0; i < weights.size(); ++i) weights[i].value = values[i];
}

UniformNoise::UniformNoise(double strength, int64_t seed) : strength_(strength), seed_(seed) {
  TORCH_CHECK_VALUE(strength >= 0 && std::isfinite(strength), "UniformNoise: strength = ", strength,
                    ", expected a finite number of at least 0");
  TORCH_CHECK_VALUE(seed >= 0, "UniformNoise: seed = ", seed, ", expected at least 0");
}

void UniformNoise::replace(std::vector<Weight>& weights) {
  const at::Device device = weights.front().value.device();
  if (!generator_.defined() || generator_.device() != device) {
    generator_ = at::globalContext().defaultGenerator(device).clone();
    generator_.set_current_seed(seed_);
    // That of another kind of device has another size: there the draws begin anew.
    if (state_.defined() && state_.numel() == generator_.get_state().numel()) generator_.set_state(state_);
    state_.reset();
  }
  // Each step for all weights together: on a device most would be too short to be worth a launch.
  std::vector<at::Tensor> values, noise;
  std::vector<at::Scalar> roots;
  for (Weight& weight : weights) {
    const at::Tensor& w = values.emplace_back(weight.value);
    noise.push_back(at::rand(w.sizes(), generator_, w.options()));
    roots.emplace_back(std::sqrt(static_cast<double>(w.numel())));
  }
  at::_foreach_mul_(noise, 2);
  at::_foreach_sub_(noise, 1);
  auto rms = at::_foreach_norm(values, 2, at::kDouble);
  at::_foreach_div_(rms, roots);
  at::_foreach_mul_(rms, strength_);
  for (size_t i = 0; i < weights.size(); ++i) noise[i].mul_(rms[i].to(noise[i].scalar_type()));
  values = at::_foreach_add(values, noise);
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i].value = values[i];
    weights[i].storage = Storage::dense(values[i]);
  }
}

State UniformNoise::state_dict() const {
  State state{{"seed", seed_}};
  if (generator_.defined()) {
    state.emplace("generator", generator_.get_state());
  } else if (state_.defined()) {
    state.emplace("generator", state_);
  }
  return state;
}

void UniformNoise::load_state_dict(const State& state) {
  const auto seed = read<int64_t>(state, "seed");
  state_ = state.contains("generator") ? read<at::Tensor>(state, "generator").cpu() : at::Tensor();
  seed_ = seed;
  generator_ = at::Generator();
}

}  // namespace cctorch::regularize
