#pragma once

#include <cctorch/safetensors.h>
#include <torch/nn/module.h>

namespace cctorch {

// The parameters and buffers of `model` (without the statistics of a normalization that reads nothing), not copies of
// them, by the names that they have in the state_dict of the same network in Python: a compressed layer that gathers
// its input is "layer" there, beside the buffer "index". With a plan, a safetensors file of them is the compressed
// network, in either language.
Safetensors::Tensors state_dict(const torch::nn::Module& model);

// Copies `state`, with or without weights that are codes (codes.h), into a model to which the plan is applied already.
// Throws c10::ValueError naming the tensor that is missing, of another shape or not the model's, or the layer that
// gathers other channels; nothing has changed then.
void load_state_dict(torch::nn::Module& model, const Safetensors::Tensors& state);

}  // namespace cctorch
