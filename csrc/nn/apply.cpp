#include <cctorch/nn/apply.h>
#include <cctorch/nn/compressible.h>
#include <torch/nn/modules/rnn.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/lbfgs.h>
#include <torch/optim/sgd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "csrc/nn/named_layers.h"

namespace cctorch {

namespace {

using Parameters = torch::OrderedDict<std::string, at::Tensor>;

struct PlannedLayer {
  const LayerPlan* plan;
  nn::Compressible* layer;
  std::shared_ptr<torch::nn::Module> module;
};

std::string first_names(const std::vector<nn::NamedLayer>& layers) {
  std::string names;
  size_t listed = 0;
  for (const nn::NamedLayer& layer : layers) {
    if (++listed > 5) return names + ", ...";
    names += (names.empty() ? "" : ", ") + layer.name;
  }
  return names.empty() ? "no compressible layer" : names;
}

// The module that `plan` names, or PyTorch's LSTM of which it names a weight.
const torch::nn::Module* module_of(torch::nn::Module& model, const LayerPlan& plan) {
  const auto modules = model.named_modules("", /*include_self=*/false);
  if (const auto* const module = modules.find(plan.name)) return module->get();
  if (const auto* const module = modules.find(plan.name.substr(0, plan.name.rfind('.'))))
    return dynamic_cast<const torch::nn::LSTMImpl*>(module->get());
  return nullptr;
}

[[noreturn]] void refuse(torch::nn::Module& model, const LayerPlan& plan, const std::vector<nn::NamedLayer>& layers) {
  const auto* const module = module_of(model, plan);
  TORCH_CHECK_VALUE(module != nullptr, "plan: the model has no layer '", plan.name, "', it has ", first_names(layers),
                    ": the plan was made for another architecture");
  TORCH_CHECK_VALUE(false, "layer '", plan.name, "' is a ", plan.kind == LayerKind::lstm ? "weight of a " : "",
                    module->name(),
                    ", which apply() cannot rebuild: build the model with cctorch::nn::Conv2d, Linear, BatchNorm2d and "
                    "LSTM");
}

std::vector<PlannedLayer> find_layers(torch::nn::Module& model, const CompressionPlan& plan) {
  const std::vector<nn::NamedLayer> layers = nn::named_layers(model);
  std::vector<PlannedLayer> planned;
  std::unordered_map<const nn::Compressible*, const LayerPlan*> seen;
  for (const LayerPlan& layer_plan : plan.layers) {
    const auto found = std::ranges::find(layers, layer_plan.name, &nn::NamedLayer::name);
    if (found == layers.end()) {
      // Of a torch::nn::LSTM, in a plan that was made in Python.
      if (layer_plan.kind == LayerKind::lstm && layer_plan.is_unchanged()) continue;
      refuse(model, layer_plan, layers);
    }
    const auto [earlier, is_new] = seen.emplace(found->layer, &layer_plan);
    TORCH_CHECK_VALUE(is_new, "layers '", earlier->second->name, "' and '", layer_plan.name,
                      "' are one module under two names, expected at most one of them in the plan");
    found->layer->check(layer_plan);
    if (!layer_plan.keeps_shape()) planned.push_back({&layer_plan, found->layer, found->module});
  }
  return planned;
}

bool carries_over(const torch::optim::OptimizerParamState& state) {
  return dynamic_cast<const torch::optim::SGDParamState*>(&state) != nullptr ||
         dynamic_cast<const torch::optim::AdamParamState*>(&state) != nullptr ||
         dynamic_cast<const torch::optim::AdamWParamState*>(&state) != nullptr;
}

template <typename State>
bool narrow_moments(torch::optim::OptimizerParamState& state, const LayerPlan& plan) {
  auto* const moments = dynamic_cast<State*>(&state);
  if (moments == nullptr) return false;
  for (at::Tensor* moment : {&moments->exp_avg(), &moments->exp_avg_sq(), &moments->max_exp_avg_sq()}) {
    if (moment->defined()) *moment = nn::narrow(*moment, plan);
  }
  return true;
}

void narrow_state(torch::optim::OptimizerParamState& state, const LayerPlan& plan) {
  if (narrow_moments<torch::optim::AdamParamState>(state, plan)) return;
  if (narrow_moments<torch::optim::AdamWParamState>(state, plan)) return;
  at::Tensor& momentum = dynamic_cast<torch::optim::SGDParamState&>(state).momentum_buffer();
  if (momentum.defined()) momentum = nn::narrow(momentum, plan);
}

at::MemoryFormat format_of(const torch::nn::Module& model) {
  // An image of one channel, and a kernel of one position, are in both layouts.
  for (const at::Tensor& parameter : model.parameters()) {
    if (parameter.dim() == 4 && !parameter.is_contiguous() && parameter.is_contiguous(at::MemoryFormat::ChannelsLast))
      return at::MemoryFormat::ChannelsLast;
  }
  return at::MemoryFormat::Contiguous;
}

void expect_optimizer_of(torch::optim::Optimizer& optimizer, const torch::nn::Module& model,
                         const std::vector<PlannedLayer>& layers) {
  const auto trains = [](const PlannedLayer& planned) {
    return std::ranges::any_of(planned.module->parameters(), &at::Tensor::requires_grad);
  };
  if (std::ranges::none_of(layers, trains)) return;
  std::unordered_set<const void*> held;
  for (const torch::optim::OptimizerParamGroup& group : optimizer.param_groups())
    for (const at::Tensor& parameter : group.params()) held.insert(parameter.unsafeGetTensorImpl());
  const auto is_held = [&](const at::Tensor& parameter) { return held.contains(parameter.unsafeGetTensorImpl()); };
  TORCH_CHECK_VALUE(std::ranges::any_of(model.parameters(), is_held),
                    "optimizer: it has none of the model's parameters, and would go on without the new ones: pass the "
                    "one that trains this model");
}

void check_optimizer(torch::optim::Optimizer& optimizer, const std::vector<PlannedLayer>& layers) {
  // It has one state for all parameters together, under the first of them.
  TORCH_CHECK_VALUE(
      layers.empty() || optimizer.state().empty() || dynamic_cast<const torch::optim::LBFGS*>(&optimizer) == nullptr,
      "optimizer: the state of LBFGS is of all parameters of before and cannot be carried over: call "
      "apply() without the optimizer and make a new one from the compressed model");
  for (const PlannedLayer& planned : layers) {
    for (const auto& parameter : planned.module->named_parameters(/*recurse=*/false)) {
      const auto state = optimizer.state().find(parameter.value().unsafeGetTensorImpl());
      TORCH_CHECK_VALUE(state == optimizer.state().end() || carries_over(*state->second), "optimizer: the state of '",
                        planned.plan->name, ".", parameter.key(),
                        "' is not that of SGD, Adam or AdamW and cannot be carried over: call apply() without the "
                        "optimizer and make a new one from the compressed model");
    }
  }
}

// What takes the place of each old parameter.
using Replacements = std::map<const void*, std::vector<at::Tensor>>;

// Of a weight that is gone: factors, or the bias that a layer without one gets where it reads nothing any more.
std::vector<at::Tensor> instead_of(const Parameters& before, const Parameters& after) {
  std::vector<at::Tensor> fresh;
  for (const auto& parameter : after) {
    if (before.find(parameter.key()) == nullptr) fresh.push_back(parameter.value());
  }
  return fresh;
}

void replace_state(torch::optim::Optimizer& optimizer, const LayerPlan& plan, const Parameters& before,
                   const Parameters& after, Replacements& replacements) {
  for (const auto& parameter : before) {
    void* const key = parameter.value().unsafeGetTensorImpl();
    const at::Tensor* const successor = after.find(parameter.key());
    if (successor != nullptr && successor->is_same(parameter.value())) continue;
    replacements[key] = successor != nullptr ? std::vector<at::Tensor>{*successor} : instead_of(before, after);
    const auto state = optimizer.state().find(key);
    if (state == optimizer.state().end()) continue;
    auto carried = std::move(state->second);
    optimizer.state().erase(key);
    if (successor == nullptr) continue;
    narrow_state(*carried, plan);
    optimizer.state()[successor->unsafeGetTensorImpl()] = std::move(carried);
  }
}

void replace_parameters(torch::optim::Optimizer& optimizer, const Replacements& replacements) {
  for (torch::optim::OptimizerParamGroup& group : optimizer.param_groups()) {
    std::vector<at::Tensor> parameters;
    for (const at::Tensor& parameter : group.params()) {
      const auto replacement = replacements.find(parameter.unsafeGetTensorImpl());
      if (replacement == replacements.end()) {
        parameters.push_back(parameter);
      } else {
        parameters.insert(parameters.end(), replacement->second.begin(), replacement->second.end());
      }
    }
    group.params() = std::move(parameters);
  }
}

}  // namespace

void apply(torch::nn::Module& model, const CompressionPlan& plan, torch::optim::Optimizer* optimizer) {
  plan.validate();
  const std::vector<PlannedLayer> layers = find_layers(model, plan);
  if (optimizer != nullptr) {
    expect_optimizer_of(*optimizer, model, layers);
    check_optimizer(*optimizer, layers);
  }

  const at::MemoryFormat format = format_of(model);
  Replacements replacements;
  // The old parameters live until the optimizer has let go of them: their addresses are its keys.
  std::vector<Parameters> replaced;
  for (const PlannedLayer& planned : layers) {
    replaced.push_back(planned.module->named_parameters(/*recurse=*/false));
    planned.layer->compress(*planned.plan, format);
    if (optimizer == nullptr) continue;
    const Parameters after = planned.module->named_parameters(/*recurse=*/false);
    replace_state(*optimizer, *planned.plan, replaced.back(), after, replacements);
  }
  if (optimizer != nullptr) replace_parameters(*optimizer, replacements);
}

}  // namespace cctorch
