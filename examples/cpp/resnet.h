#pragma once

#include <cctorch/cctorch.h>
#include <torch/nn/modules/container/sequential.h>

#include <cstdint>
#include <string>
#include <vector>

// Two 3 x 3 convolutions beside a shortcut without parameters, which subsamples and pads with zero channels where the
// shape changes (option A of He et al. 2016).
class BlockImpl : public torch::nn::Module {
 public:
  BlockImpl(int64_t in_channels, int64_t out_channels, int64_t stride);

  at::Tensor forward(const at::Tensor& x);
  cctorch::ChannelGraph::Channels describe(cctorch::ChannelGraph& graph, const std::string& path,
                                           const cctorch::ChannelGraph::Channels& x) const;

 private:
  int64_t out_channels_, stride_, zero_channels_;  // zero channels before and behind those of x
  cctorch::nn::Conv2d conv1_, conv2_;
  cctorch::nn::BatchNorm2d bn1_, bn2_;
};
TORCH_MODULE(Block);

// ResNet for small images of one colour: 6 * blocks + 2 layers, of 16, 32 and 64 channels.
class ResNetImpl : public torch::nn::Module {
 public:
  ResNetImpl(int64_t blocks, int64_t classes);

  // x: batch x 1 x height x width; class scores.
  at::Tensor forward(const at::Tensor& x);

  // Batch normalization by the statistics of all ranks' images.
  void synchronize(const cctorch::distributed::Ranks& ranks);

  // Which channels live and die together.
  cctorch::ChannelGraph channel_graph() const;

 private:
  int64_t classes_;
  cctorch::nn::Conv2d conv1_;
  cctorch::nn::BatchNorm2d bn1_;
  std::vector<torch::nn::Sequential> stages_;
  cctorch::nn::Linear linear_;
};
TORCH_MODULE(ResNet);
