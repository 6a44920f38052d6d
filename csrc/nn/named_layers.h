#pragma once

#include <cctorch/nn/compressible.h>
#include <torch/nn/module.h>

#include <memory>
#include <string>
#include <vector>

namespace cctorch::nn {

// A layer by the name that plans and specs give it.
struct NamedLayer {
  std::string name;
  Compressible* layer;
  std::shared_ptr<torch::nn::Module> module;  // the layer itself, or the LSTM of which it is a weight
};

// All of a model in order of registration, a shared one under each of its names.
std::vector<NamedLayer> named_layers(torch::nn::Module& model);

}  // namespace cctorch::nn
