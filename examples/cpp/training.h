#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/nn.h>
#include <torch/optim/sgd.h>

#include <cstdint>
#include <string>

#include "fashion_mnist.h"
#include "resnet.h"

struct Schedule {
  std::string label;
  int64_t epochs = 1;
  int64_t batch = 128;
  double peak_lr = 0.1;
};

// One cycle (Smith 2018): linear up to peak_lr over the first 30 % of the steps, then half a cosine down to zero.
// Random crops and flips. Throws std::runtime_error when the loss is no longer finite.
void train(ResNet& model, torch::optim::SGD& optimizer, const Images& images, const Schedule& schedule);

// Percent of the images whose highest score is the label's, in eval mode.
double accuracy(ResNet& model, const Images& images, int64_t batch);

// Mean cross-entropy of one batch after the other, without augmentation.
cctorch::collaborative::NextLoss losses(ResNet& model, const Images& images, int64_t batch);

// Takes the statistics of the batch normalizations anew, over the first `limit` images.
void reestimate(ResNet& model, const Images& images, int64_t batch, int64_t limit);

// Median seconds of a forward pass over `batch` images, in eval mode.
double latency(ResNet& model, const Images& images, int64_t batch);
