#include <ATen/ops/full.h>
#include <ATen/ops/zeros_like.h>
#include <cctorch/nn/compressible.h>
#include <cctorch/nn/gradients.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/rnn.h>
#include <torch/types.h>

#include <algorithm>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>

#include "csrc/nn/eval_mode.h"
#include "csrc/nn/named_layers.h"

namespace cctorch {

namespace {

bool is_dense_torch_layer(const torch::nn::Module& module) {
  return dynamic_cast<const torch::nn::Conv2dImpl*>(&module) != nullptr ||
         dynamic_cast<const torch::nn::LinearImpl*>(&module) != nullptr ||
         dynamic_cast<const torch::nn::LSTMImpl*>(&module) != nullptr;
}

void warn_of_dense_torch_layers(torch::nn::Module& model) {
  std::unordered_set<const torch::nn::Module*> seen;  // named_modules() has a shared one under each of its names
  for (const auto& module : model.named_modules("", /*include_self=*/false)) {
    if (!is_dense_torch_layer(*module.value()) || !seen.insert(module.value().get()).second) continue;
    TORCH_WARN("layer '", module.key(), "' is a ", module.value()->name(),
               ", whose work is not counted and which is left alone: use the layer of cctorch::nn in its place");
  }
}

}  // namespace

std::vector<LayerSpec> layer_specs(torch::nn::Module& model, const std::function<void()>& forward) {
  const std::vector<nn::NamedLayer> layers = nn::named_layers(model);
  const auto observe = [&](bool on) {
    for (const nn::NamedLayer& named : layers) named.layer->observe(on);
  };
  {
    const EvalMode eval(model);
    const torch::NoGradGuard no_grad;
    observe(true);
    forward();
    observe(false);
  }
  std::vector<LayerSpec> specs;
  std::unordered_set<const nn::Compressible*> seen;
  for (const nn::NamedLayer& named : layers) {
    if (!seen.insert(named.layer).second) continue;
    LayerSpec spec = named.layer->spec(named.name);
    if (spec.positions > 0) specs.push_back(std::move(spec));
  }
  warn_of_dense_torch_layers(model);
  return specs;
}

namespace collaborative {

std::vector<Layer> mean_gradients(torch::nn::Module& model, const std::vector<LayerSpec>& specs,
                                  const NextLoss& next_loss, const distributed::Ranks& ranks) {
  TORCH_CHECK_VALUE(!specs.empty(), "specs: empty, expected at least one layer");
  const std::vector<nn::NamedLayer> named = nn::named_layers(model);
  std::vector<at::Tensor> weights, sums;
  for (const LayerSpec& spec : specs) {
    const auto found = std::ranges::find(named, spec.name, &nn::NamedLayer::name);
    TORCH_CHECK_VALUE(found != named.end(), "specs: the model has no layer '", spec.name, "' of cctorch::nn");
    const auto of_layer = found->layer->weights();
    TORCH_CHECK_VALUE(of_layer.size() == 1 && !found->layer->plan(), "layer '", spec.name,
                      "' is compressed already or has no weight, expected a dense Conv2d, Linear or weight of an LSTM");
    const at::Tensor& weight = of_layer.front().second;
    TORCH_CHECK_VALUE(weight.requires_grad(), "layer '", spec.name,
                      "': its weight is frozen, expected requires_grad: unfreeze it, or leave it out of the search");
    weights.push_back(weight);
    sums.push_back(at::zeros_like(weight, at::TensorOptions().dtype(at::kDouble)));
  }

  const EvalMode eval(model);
  const RecurrentGradients recurrent(model);
  const torch::AutoGradMode grad_mode(true);
  int64_t own = 0;
  while (const std::optional<BatchLoss> batch = next_loss()) {
    TORCH_CHECK_VALUE(batch->examples > 0, "next_loss: a batch of ", batch->examples,
                      " examples, expected at least one");
    const auto gradients = torch::autograd::grad({batch->loss}, weights, {}, /*retain_graph=*/false,
                                                 /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t i = 0; i < weights.size(); ++i) {
      TORCH_CHECK_VALUE(gradients[i].defined(), "layer '", specs[i].name, "' does not contribute to the loss");
      sums[i].add_(gradients[i], static_cast<double>(batch->examples));
    }
    own += batch->examples;
  }
  for (const at::Tensor& sum : sums) ranks.sum_(sum);
  const int64_t examples = ranks.gather(at::full({}, own, at::kLong)).sum().item<int64_t>();
  TORCH_CHECK_VALUE(examples > 0, "next_loss: no batch, expected at least one");

  std::vector<Layer> layers;
  for (size_t i = 0; i < specs.size(); ++i) layers.push_back({specs[i], weights[i].detach(), sums[i] / examples});
  return layers;
}

}  // namespace collaborative
}  // namespace cctorch
