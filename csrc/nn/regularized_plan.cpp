#include <cctorch/regularized_plan.h>
#include <torch/nn/module.h>

#include <set>
#include <vector>

#include "csrc/nn/named_layers.h"

namespace cctorch::regularize {

CompressionPlan plan(torch::nn::Module& model, const NamedParameters& parameters, Regularizer& regularizer) {
  std::set<const void*> acted_on;
  for (const auto& [name, parameter] : regularizer.select(parameters)) acted_on.insert(parameter.unsafeGetTensorImpl());
  std::vector<LayerSpec> specs;
  NamedParameters weights;
  for (const nn::NamedLayer& layer : nn::named_layers(model)) {
    specs.push_back(layer.layer->spec(layer.name));
    const auto own = layer.layer->weights();
    // One that is compressed already stays: a plan's indices refer to the dense model.
    if (layer.layer->plan() || own.size() != 1 || !acted_on.erase(own[0].second.unsafeGetTensorImpl())) continue;
    weights.emplace_back(layer.name, own[0].second);
  }
  return plan(specs, weights, regularizer);
}

}  // namespace cctorch::regularize
