#pragma once

#include <cstdint>
#include <filesystem>

#include "fashion_mnist.h"
#include "resnet.h"
#include "training.h"

struct Measurements {
  double top1 = 0.0, latency_1 = 0.0, latency_128 = 0.0;
  int64_t parameters = 0, macs = 0, bytes = 0;
};

// Of `model`, stored as the tensors `state` in `file`. Rank 0 writes and takes the times; the accuracy is over all
// ranks.
Measurements measure(ResNet& model, const Images& images, int64_t macs, const cctorch::Safetensors::Tensors& state,
                     const std::filesystem::path& file, const Ranks& ranks);

void print_table(const Measurements& before, const Measurements& after);
