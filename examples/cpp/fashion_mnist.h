#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

struct Images {
  at::Tensor pixels;  // uint8, images x height x width
  at::Tensor labels;  // int64, images
};

struct FashionMnist {
  Images train, test;
};

// Reads the four idx files in `folder`, each gzip-compressed (name.gz) or not; an empty name stands for where Debian's
// package puts them. At most `limit` images of each set, 0 for all. Throws std::runtime_error naming the file, or the
// folder, that cannot be read, or is none of Fashion-MNIST's.
FashionMnist read_fashion_mnist(const std::string& folder, int64_t limit);

// Writes a small set of the same format into `folder`: 10 classes, each a pattern of its own under noise.
void write_synthetic(const std::string& folder, int64_t train_images, int64_t test_images);
