#include <ATen/ops/full.h>
#include <ATen/ops/where.h>
#include <cctorch/mask.h>
#include <cctorch/nn/compressible.h>
#include <cctorch/nn/prepare.h>
#include <torch/types.h>

#include <limits>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "csrc/nn/layer_parts.h"

namespace cctorch {

namespace {

// A weight that the plan acts on.
struct Target {
  const LayerPlan* plan;
  nn::Compressible* layer;
  std::string name;
  at::Tensor weight;
  at::Tensor mask;
};

void check_layer(const LayerPlan& plan, const nn::Compressible& layer) {
  nn::check_architecture(plan, layer.spec(plan.name));
  TORCH_CHECK_VALUE(layer.constraints().empty(), "plan: layer '", plan.name,
                    "' is prepared already, call convert() first");
  TORCH_CHECK_VALUE(!layer.weights().empty(), "plan: layer '", plan.name,
                    "' has no weight, expected a convolution or a linear layer that reads something");
}

std::vector<Target> find_targets(torch::nn::Module& model, const CompressionPlan& plan) {
  const auto modules = model.named_modules("", /*include_self=*/false);
  std::vector<Target> targets;
  std::unordered_map<const nn::Compressible*, const LayerPlan*> seen;
  for (const LayerPlan& layer_plan : plan.layers) {
    if (!layer_plan.mask && !layer_plan.bits) continue;
    const auto* const module = modules.find(layer_plan.name);
    TORCH_CHECK_VALUE(module != nullptr, "plan: the model has no layer '", layer_plan.name, "' to mask or quantize");
    auto* const layer = dynamic_cast<nn::Compressible*>(module->get());
    TORCH_CHECK_VALUE(layer != nullptr, "plan: layer '", layer_plan.name, "' is a ", (*module)->name(),
                      ", which takes no mask or bits: build the model with cctorch::nn::Conv2d and Linear");
    const auto [earlier, is_new] = seen.emplace(layer, &layer_plan);
    TORCH_CHECK_VALUE(is_new, "plan: layers '", earlier->second->name, "' and '", layer_plan.name,
                      "' are one module under two names, expected at most one of them");
    check_layer(layer_plan, *layer);
    for (const auto& [name, weight] : layer->weights()) {
      TORCH_CHECK_VALUE(weight.isfinite().all().item<bool>(), "plan: layer '", layer_plan.name, "' has a ", name,
                        " with NaN or infinity");
      targets.push_back({&layer_plan, layer, name, weight.detach(), {}});
    }
  }
  return targets;
}

void set_masks(std::vector<Target>& targets) {
  std::map<double, std::vector<Target*>> together;
  for (Target& target : targets) {
    const auto& planned = target.plan->mask;
    if (!planned) continue;
    const MaskPlan& mask = *planned;
    if (mask.kind == MaskPlan::Kind::magnitude) {
      together[mask.sparsity].push_back(&target);
    } else if (mask.kind == MaskPlan::Kind::channel) {
      target.mask = channel_masks({target.weight}, mask.sparsity).front();
    } else {
      TORCH_CHECK_VALUE(target.weight.size(1) % mask.m == 0, "plan: layer '", target.plan->name, "' has ",
                        target.weight.size(1), " input channels, expected a multiple of m = ", mask.m,
                        " for its mask; leave it out or choose another m");
      target.mask = nm_masks({target.weight}, mask.n, mask.m).front();
    }
  }
  for (const auto& [sparsity, members] : together) {
    std::vector<at::Tensor> weights;
    for (const Target* const member : members) weights.push_back(member->weight);
    const std::vector<at::Tensor> masks = magnitude_masks(weights, sparsity);
    for (size_t i = 0; i < members.size(); ++i) members[i]->mask = masks[i];
  }
}

nn::Constraint constraint_of(const Target& target, const std::string& init) {
  nn::Constraint constraint{.weight = target.name};
  if (target.mask.defined()) constraint.mask = nn::Mask(target.mask);
  if (target.plan->bits) {
    constraint.quant =
        nn::FakeQuant(nn::FakeQuantOptions(*target.plan->bits).axis(0).channels(target.weight.size(0)).init(init));
    const auto type = c10::promoteTypes(target.weight.scalar_type(), at::kFloat);
    constraint.quant->to(target.weight.device(), type);
    // What is not finite has no say in the scale.
    const at::Tensor counted =
        target.mask.defined()
            ? at::where(target.mask, target.weight,
                        at::full({}, std::numeric_limits<double>::quiet_NaN(), target.weight.options()))
            : target.weight;
    constraint.quant->initialize(counted);
  }
  return constraint;
}

}  // namespace

void set_bits(const std::vector<LayerSpec>& model, CompressionPlan& plan, const std::map<std::string, int64_t>& bits) {
  CompressionPlan changed = plan;
  std::map<std::string, int64_t> left = bits;
  for (const LayerSpec& spec : model) {
    const auto found = left.extract(spec.name);
    if (found.empty()) continue;
    TORCH_CHECK_VALUE(spec.kind != LayerKind::batch_norm2d && spec.kind != LayerKind::lstm, "bits: layer '", spec.name,
                      "' is of kind ", to_string(spec.kind), ", expected a convolution or a linear layer");
    LayerPlan* layer = changed.find(spec.name);
    if (layer == nullptr) {
      layer =
          &changed.layers.emplace_back(LayerPlan::unchanged(spec.name, spec.kind, spec.in_channels, spec.out_channels));
    }
    if (!layer->reads_nothing()) layer->bits = found.mapped();
  }
  TORCH_CHECK_VALUE(left.empty(), "bits: the model has no layer '", left.begin()->first, "'");
  changed.validate();
  plan = std::move(changed);
}

void prepare(torch::nn::Module& model, const CompressionPlan& plan, const std::string& init) {
  plan.validate();
  const torch::NoGradGuard no_grad;
  std::vector<Target> targets = find_targets(model, plan);
  set_masks(targets);
  std::vector<nn::Constraint> constraints;
  for (const Target& target : targets) constraints.push_back(constraint_of(target, init));
  for (size_t i = 0; i < targets.size(); ++i) targets[i].layer->constrain(constraints[i]);
}

void convert(torch::nn::Module& model) {
  for (const auto& module : model.modules()) {
    if (auto* const layer = dynamic_cast<nn::Compressible*>(module.get())) layer->bake();
  }
}

}  // namespace cctorch
