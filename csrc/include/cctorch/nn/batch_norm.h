#pragma once

#include <cctorch/distributed.h>
#include <torch/nn/module.h>

#include <functional>

namespace cctorch {

// Replaces the running statistics of every batch normalization in `model` by their average over batches, each counting
// the same: compressed layers feed other distributions to them than those they were trained on. `next_batch` runs the
// model on one batch and returns false, without running it, after the last. Only the normalizations are in training
// mode meanwhile; the mode of every module and the momentum are put back.
// With several ranks, each runs its slices of the batches, equally many, and nn::BatchNorm2d finds the statistics of
// whole batches; those of torch::nn are the mean of the slices'. Throws c10::Error if there is no batch. The statistics
// are unchanged then, and when the model throws.
void reestimate_batch_norm(torch::nn::Module& model, const std::function<bool()>& next_batch,
                           const distributed::Ranks& ranks = {});

}  // namespace cctorch
