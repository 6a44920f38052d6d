#pragma once

#include <cctorch/plan.h>
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

namespace cctorch {

// Carries out `plan` on the layers of `model` that it names, in place. Layers are the cctorch::nn modules, found by
// their path, and the weights of an nn::LSTM.
//
// With an optimizer (SGD, Adam or AdamW), the new parameters take the place of the old ones in its groups, and momentum
// and moments are carried over by kept index; the factors of a decomposed weight start without state. Without one, an
// optimizer that exists still holds the old parameters.
//
// Throws c10::Error naming the layer, what was found and what was expected: a name that the model does not have,
// another kind or other channels (another architecture), a layer that is compressed or prepared already, state of
// another optimizer, an optimizer that has none of the model's parameters. The model and the optimizer are then as
// before.
//
// Masks and bits of the plan are for prepare() (prepare.h), once the layers are rebuilt.
void apply(torch::nn::Module& model, const CompressionPlan& plan, torch::optim::Optimizer* optimizer = nullptr);

}  // namespace cctorch
