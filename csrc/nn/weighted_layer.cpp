#include <cctorch/collaborative.h>
#include <cctorch/gather_channels.h>
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

void check_rank(const LayerPlan& plan, int64_t kernel_size) {
  if (!plan.rank) return;
  const int64_t columns = static_cast<int64_t>(plan.kept_in.size()) * kernel_size;
  const int64_t most = std::min(plan.out_channels, columns);
  TORCH_CHECK_VALUE(*plan.rank <= most, "layer '", plan.name, "': rank = ", *plan.rank, ", expected at most ", most,
                    ": its weight restricted to the kept inputs is a matrix of ", plan.out_channels, " x ", columns);
}

template <typename Derived>
void WeightedLayer<Derived>::register_parameters(int64_t out, int64_t in, at::IntArrayRef kernel, bool with_bias) {
  const auto shape = [&](int64_t rows, int64_t columns, bool pointwise) {
    std::vector<int64_t> sizes = {rows, columns};
    for (const int64_t size : kernel) sizes.push_back(pointwise ? 1 : size);
    return sizes;
  };
  for (at::Tensor* parameter : {&weight, &first, &second, &bias}) *parameter = at::Tensor();
  const std::optional<int64_t> rank = plan_ ? plan_->rank : std::nullopt;
  if (in == 0) {
    with_bias = out > 0;
  } else if (rank) {
    first = this->register_parameter("first", torch::empty(shape(*rank, in, false)));
    second = this->register_parameter("second", torch::empty(shape(out, *rank, true)));
  } else {
    weight = this->register_parameter("weight", torch::empty(shape(out, in, false)));
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
std::vector<std::pair<std::string, at::Tensor>> WeightedLayer<Derived>::weights() const {
  std::vector<std::pair<std::string, at::Tensor>> found;
  for (const auto& [name, value] : {std::pair("weight", &weight), {"first", &first}, {"second", &second}}) {
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
    initialize_uniform(second, &bias);
  }
}

template <typename Derived>
void WeightedLayer<Derived>::carry_out(const LayerPlan& plan) {
  const torch::NoGradGuard no_grad;
  if (plan.reads_nothing()) return leave_bias_only(plan);
  const bool requires_grad = weight.requires_grad();
  const at::Tensor dense = weight.detach();
  const at::MemoryFormat format = dense.suggest_memory_format();
  at::Tensor narrowed, outer, inner;
  if (plan.rank) {
    std::tie(inner, outer) = collaborative::factorize(dense, plan.kept_in, *plan.rank);
    const at::Tensor kept_out = torch::tensor(plan.kept_out, torch::dtype(torch::kLong)).to(outer.device());
    inner = inner.to(dense.options()).contiguous(format);
    outer = outer.index_select(0, kept_out).to(dense.options()).contiguous(format);
  } else {
    narrowed = narrow(dense, plan);
  }
  const at::Tensor narrowed_bias = bias.defined() ? narrow(bias, plan) : at::Tensor();

  plan_ = plan;
  gather_ = plan.gather.empty() ? at::Tensor() : torch::tensor(plan.gather, torch::dtype(torch::kLong));
  this->parameters_.clear();
  weight = at::Tensor();
  if (plan.rank) {
    first = this->register_parameter("first", inner, requires_grad);
    second = this->register_parameter("second", outer, requires_grad);
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
  if (gather_.defined()) stream << ", gathering its input";
}

template class WeightedLayer<Conv2dImpl>;
template class WeightedLayer<LinearImpl>;

}  // namespace cctorch::nn
