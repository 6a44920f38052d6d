#include <cctorch/gather_channels.h>
#include <cctorch/nn/factors.h>
#include <cctorch/nn/layers.h>

#include <algorithm>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "csrc/nn/layer_parts.h"

namespace cctorch::nn {

namespace {

constexpr auto mask_suffix = "_mask", quant_suffix = "_quant";

}  // namespace

template <typename Derived>
void WeightedLayer<Derived>::register_parameters(int64_t out, int64_t in, at::IntArrayRef kernel, bool with_bias) {
  for (at::Tensor* parameter : {&weight, &first, &core, &second, &bias}) *parameter = at::Tensor();
  if (in == 0) {
    with_bias = out > 0;
  } else if (plan_ && plan_->rank) {
    register_factors(empty_factors(*plan_, out, in, kernel), /*requires_grad=*/true);
  } else {
    std::vector<int64_t> sizes = {out, in};
    sizes.insert(sizes.end(), kernel.begin(), kernel.end());
    weight = this->register_parameter("weight", torch::empty(sizes));
  }
  if (with_bias) bias = this->register_parameter("bias", torch::empty({out}));
  // Of a clone, which has the children of the layer that it is made from until then.
  const std::vector<Constraint> constraints = std::exchange(constraints_, {});
  for (const Constraint& constraint : constraints) {
    Constraint copy{.weight = constraint.weight};
    if (!constraint.mask.is_empty()) copy.mask = Mask(constraint.mask->mask);
    if (!constraint.quant.is_empty()) copy.quant = FakeQuant(constraint.quant->options);
    constrain(copy);
  }
}

template <typename Derived>
void WeightedLayer<Derived>::register_factors(const Factors& factors, bool requires_grad) {
  first = this->register_parameter("first", factors.first, requires_grad);
  if (factors.core.defined()) core = this->register_parameter("core", factors.core, requires_grad);
  second = this->register_parameter("second", factors.second, requires_grad);
}

template <typename Derived>
std::vector<std::pair<std::string, at::Tensor>> WeightedLayer<Derived>::weights() const {
  std::vector<std::pair<std::string, at::Tensor>> found;
  for (const auto& [name, value] :
       {std::pair("weight", &weight), {"first", &first}, {"core", &core}, {"second", &second}}) {
    if (value->defined()) found.emplace_back(name, *value);
  }
  return found;
}

template <typename Derived>
void WeightedLayer<Derived>::constrain(const Constraint& constraint) {
  if (!constraint.mask.is_empty()) this->register_module(constraint.weight + mask_suffix, constraint.mask.ptr());
  if (!constraint.quant.is_empty()) this->register_module(constraint.weight + quant_suffix, constraint.quant.ptr());
  constraints_.push_back(constraint);
}

template <typename Derived>
void WeightedLayer<Derived>::bake() {
  const torch::NoGradGuard no_grad;
  for (const auto& [name, value] : weights()) value.copy_(constrained(value));
  for (const Constraint& constraint : std::exchange(constraints_, {})) {
    if (!constraint.mask.is_empty()) this->unregister_module(constraint.weight + mask_suffix);
    if (!constraint.quant.is_empty()) this->unregister_module(constraint.weight + quant_suffix);
  }
}

template <typename Derived>
at::Tensor WeightedLayer<Derived>::constrained(const at::Tensor& parameter) const {
  for (const Constraint& constraint : constraints_) {
    const at::Tensor* const value = this->parameters_.find(constraint.weight);
    if (value != nullptr && value->is_same(parameter)) return constraint(parameter);
  }
  return parameter;
}

template <typename Derived>
void WeightedLayer<Derived>::reset_parameters() {
  if (weight.defined()) {
    initialize_uniform(weight, &bias);
  } else if (!first.defined()) {
    const torch::NoGradGuard no_grad;
    if (bias.defined()) bias.zero_();
  } else {
    initialize_uniform(first, nullptr);
    if (core.defined()) initialize_uniform(core, nullptr);
    initialize_uniform(second, &bias);
  }
}

template <typename Derived>
void WeightedLayer<Derived>::carry_out(const LayerPlan& plan) {
  const torch::NoGradGuard no_grad;
  if (plan.reads_nothing()) return leave_bias_only(plan);
  const bool requires_grad = weight.requires_grad();
  const at::Tensor dense = weight.detach();
  const Factors factors = plan.rank ? factorize(dense, plan) : Factors();
  const at::Tensor narrowed = plan.rank ? at::Tensor() : narrow(dense, plan);
  const at::Tensor narrowed_bias = bias.defined() ? narrow(bias, plan) : at::Tensor();

  plan_ = plan;
  gather_ = plan.gather.empty() ? at::Tensor() : torch::tensor(plan.gather, torch::dtype(torch::kLong));
  this->parameters_.clear();
  weight = at::Tensor();
  if (plan.rank) {
    register_factors(factors, requires_grad);
  } else {
    weight = this->register_parameter("weight", narrowed, requires_grad);
  }
  if (bias.defined()) bias = this->register_parameter("bias", narrowed_bias, bias.requires_grad());
}

template <typename Derived>
void WeightedLayer<Derived>::leave_bias_only(const LayerPlan& plan) {
  const at::Tensor& source = bias.defined() ? bias : weight;
  const bool requires_grad = source.requires_grad();
  const at::Tensor left = bias.defined() ? narrow(bias, plan)
                                         : torch::zeros({static_cast<int64_t>(plan.kept_out.size())},
                                                        weight.options().requires_grad(false));
  plan_ = plan;
  this->parameters_.clear();
  weight = bias = at::Tensor();
  if (!plan.kept_out.empty()) bias = this->register_parameter("bias", left, requires_grad);
}

template <typename Derived>
at::Tensor WeightedLayer<Derived>::gathered(const at::Tensor& x, int64_t dimension) {
  if (!gather_.defined()) return x;
  // Not a buffer, which Module::to(device) would move: Module::to(dtype) would also turn it into floating point.
  if (gather_.device() != x.device()) gather_ = gather_.to(x.device());
  return gather_channels(x, gather_, dimension);
}

template <typename Derived>
int64_t WeightedLayer<Derived>::stored_bits() const {
  const at::Tensor& stored = weight.defined() ? weight : first.defined() ? first : bias;
  return stored.defined() ? 8 * stored.element_size() : LayerSpec().bits;
}

template <typename Derived>
void WeightedLayer<Derived>::print_plan(std::ostream& stream) const {
  if (!plan_) return;
  stream << " compressed to " << plan_->kept_in.size() << " -> " << plan_->kept_out.size();
  if (plan_->rank) stream << ", rank " << *plan_->rank;
  if (plan_->rank_in) stream << " x " << *plan_->rank_in;
  if (plan_->layout != LowRankLayout::channel) stream << ' ' << to_string(plan_->layout);
  if (gather_.defined()) stream << ", gathering its input";
}

template class WeightedLayer<Conv2dImpl>;
template class WeightedLayer<LinearImpl>;

}  // namespace cctorch::nn
