#include "csrc/nn/named_layers.h"

#include <cctorch/nn/lstm.h>

namespace cctorch::nn {

std::vector<NamedLayer> named_layers(torch::nn::Module& model) {
  std::vector<NamedLayer> found;
  for (const auto& entry : model.named_modules("", /*include_self=*/false)) {
    const auto& module = entry.value();
    if (auto* const layer = dynamic_cast<Compressible*>(module.get())) found.push_back({entry.key(), layer, module});
    if (auto* const lstm = dynamic_cast<LSTMImpl*>(module.get())) {
      for (const auto& [weight, layer] : lstm->layers()) found.push_back({entry.key() + "." + weight, layer, module});
    }
  }
  return found;
}

}  // namespace cctorch::nn
