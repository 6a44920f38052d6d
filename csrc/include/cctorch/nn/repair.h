#pragma once

#include <cctorch/distributed.h>
#include <cctorch/plan.h>
#include <cctorch/repair.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace cctorch::repair {

struct ModelOptions {
  int64_t step = 8;       // one of so many positions of each feature map is a sample
  double ridge = 1e-5;    // relative to the mean variance of a layer's inputs
  bool shortcuts = true;  // correct the sum with a shortcut instead of the layer's own output
};

// How far a layer is from what the dense model gives at its place: mean square error over that of a constant.
struct LayerFit {
  std::string name;
  int64_t samples = 0;
  int64_t unknowns = 0;  // weights of one output
  double before = 0.0, after = 0.0;
};

struct Repair {
  std::vector<LayerFit> layers;
  // Of layers with fewer samples than unknowns: other images may fit worse than before.
  std::vector<std::string> warnings;
};

// Fits the weights of `model`, which apply() has made of a copy of `dense` by `plan`, to the outputs of `dense`, in
// place and without a gradient step: docs/collaborative-compression.md, Repair. Layers are cctorch::nn::Conv2d (of one
// group) and Linear, from the first of another shape on, that run exactly once; a cctorch::nn::BatchNorm2d behind
// one is fitted with it. Of a removed residual branch the bias becomes the mean. Shortcuts are the additions of two
// tensors of one shape (at::add, +, +=).
//
// `next_dense` runs `dense` on the next batch of the images, un-augmented, and returns false, without running it, after
// the last. `forward` runs `model` on all of them in the same order as one batch, which has to fit into memory; some
// thousands are enough. `images` is their number.
//
// With several ranks, the images are this rank's share, those of rank 0 the first, and the fit is to the samples of
// all.
//
// Throws c10::Error, on rank 0 naming the layer: `model` is not what the plan makes of `dense`, or is prepared; samples
// that are NaN or infinite; or there is no image on a rank. The model is then as before.
Repair repair(torch::nn::Module& model, const std::function<void()>& forward, torch::nn::Module& dense,
              const std::function<bool()>& next_dense, const CompressionPlan& plan, int64_t images,
              const ModelOptions& options = {}, const distributed::Ranks& ranks = {});

}  // namespace cctorch::repair
