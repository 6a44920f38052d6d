#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/collaborative.h>
#include <cctorch/distributed.h>
#include <cctorch/plan.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

namespace cctorch {

// The cctorch::nn layers of `model` in order of registration, with the output positions that `forward` (one pass over
// any example, run in eval mode without gradients) makes each compute, those of all calls of a layer that it calls
// twice. Layers that `forward` does not reach are left out, and second names of one module; a torch::nn convolution or
// linear layer cannot be counted and causes a warning that names it.
std::vector<LayerSpec> layer_specs(torch::nn::Module& model, const std::function<void()>& forward);

namespace collaborative {

struct BatchLoss {
  at::Tensor loss;  // mean over the batch, one element, with a graph
  int64_t examples = 0;
};

// The loss of the next batch; nothing after the last one.
using NextLoss = std::function<std::optional<BatchLoss>()>;

// What solve() reads of each layer in `specs`: its weight, and the gradient of the mean loss over all examples, summed
// in float64. The losses are computed in eval mode; `.grad` and the training mode of every module are left as they are.
// With several ranks, the losses are over this rank's share of the examples; the result is that over all of them.
// Throws c10::Error naming the layer if it does not exist, is compressed already or does not reach the loss, or if
// there is no batch, on any rank, or one of no examples.
std::vector<Layer> mean_gradients(torch::nn::Module& model, const std::vector<LayerSpec>& specs,
                                  const NextLoss& next_loss, const distributed::Ranks& ranks = {});

}  // namespace collaborative
}  // namespace cctorch
