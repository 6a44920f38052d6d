#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/distributed.h>
#include <cctorch/nn.h>
#include <torch/optim/sgd.h>

#include <cstdint>
#include <functional>
#include <string>

#include "fashion_mnist.h"
#include "resnet.h"

struct Schedule {
  std::string label;
  int64_t epochs = 1;
  int64_t batch = 128;
  double peak_lr = 0.1;
  uint64_t seed = 0;  // of the first epoch; the next one has the next
};

// Of all ranks, each of which works on its share of every batch; the results are those of one process up to rounding.
using cctorch::distributed::Ranks;

// One cycle (Smith 2018): linear up to peak_lr over the first 30 % of the steps, then half a cosine down to zero.
// Random crops and flips, the same for any number of ranks. Begins behind the epochs that are `done`, and calls
// `after_epoch` with the mean loss of each. Throws std::runtime_error when the loss is no longer finite.
void train(ResNet& model, torch::optim::SGD& optimizer, const Images& images, const Schedule& schedule, int64_t done,
           const Ranks& ranks, const std::function<void(double)>& after_epoch);

// Percent of the images whose highest score is the label's, in eval mode.
double accuracy(ResNet& model, const Images& images, int64_t batch, const Ranks& ranks);

// Mean cross-entropy of one batch after the other of this rank's images, without augmentation.
cctorch::collaborative::NextLoss losses(ResNet& model, const Images& images, int64_t batch, const Ranks& ranks);

// Takes the statistics of the batch normalizations anew, over the first `limit` images.
void reestimate(ResNet& model, const Images& images, int64_t batch, int64_t limit, const Ranks& ranks);

// Fits the weights of `model`, compressed by `plan`, to the outputs of `dense`, over the first `limit` images.
void repair(ResNet& model, ResNet& dense, const cctorch::CompressionPlan& plan, const Images& images, int64_t batch,
            int64_t limit, const Ranks& ranks);

// Median seconds of a forward pass over `batch` images, in eval mode.
double latency(ResNet& model, const Images& images, int64_t batch);
