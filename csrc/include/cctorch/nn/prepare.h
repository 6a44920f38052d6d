#pragma once

#include <cctorch/plan.h>
#include <cctorch/safetensors.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace cctorch {

// Writes into `plan`, for prepare(), how many bits the weights of the layers named in `bits` get. A layer that the plan
// lacks is added, otherwise unchanged; one that reads nothing has no weight, and is passed over. `model` are the dense
// model's layers. Throws c10::ValueError, the plan is then as before, naming a layer that is not among them, that is a
// BatchNorm or an LSTM's, or whose bits are not 2 to 16.
void set_bits(const std::vector<LayerSpec>& model, CompressionPlan& plan, const std::map<std::string, int64_t>& bits);

// Puts the masks and the fake-quantization (LSQ, one scale for each output channel) of `plan` on the weights of the
// layers that it names, in place: they compute with quant(mask(weight)). Layers are cctorch::nn::Conv2d and Linear,
// found by their path; of one that apply() has factored both factors are taken. Magnitude masks of equal sparsity are
// one selection over all of them. Scales start from the weights as `init` says: lsq, minmax or mse (FakeQuantOptions).
//
// The weights stay the same parameters; the scales are new ones, in the children weight_quant, for which an optimizer
// that is made afterwards has a place.
//
// Throws c10::Error naming the layer: one that the model does not have, that has no weight, is of another kind or has
// other channels, is prepared already or has a weight that is not finite. The model is then as before.
void prepare(torch::nn::Module& model, const CompressionPlan& plan, const std::string& init = "lsq");

// Gives every weight the value that its layer computes with, and lets go of masks and scales.
void convert(torch::nn::Module& model);

// state_dict() (state_dict.h) as it is after convert(), with codes (codes.h) in place of the quantized weights. The
// model stays.
Safetensors::Tensors quantized_state_dict(const torch::nn::Module& model);

}  // namespace cctorch
