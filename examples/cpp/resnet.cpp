#include "resnet.h"

#include <fmt/format.h>

#include <limits>

using cctorch::ChannelGraph;
using cctorch::LayerKind;

namespace {

constexpr int64_t stem_channels = 16;

cctorch::nn::Conv2d conv3x3(int64_t in_channels, int64_t out_channels, int64_t stride) {
  return cctorch::nn::Conv2d(
      torch::nn::Conv2dOptions(in_channels, out_channels, 3).stride(stride).padding(1).bias(false));
}

}  // namespace

BlockImpl::BlockImpl(int64_t in_channels, int64_t out_channels, int64_t stride)
    : out_channels_(out_channels),
      stride_(stride),
      zero_channels_((out_channels - in_channels) / 2),
      conv1_(register_module("conv1", conv3x3(in_channels, out_channels, stride))),
      conv2_(nullptr),
      bn1_(register_module("bn1", cctorch::nn::BatchNorm2d(out_channels))),
      bn2_(nullptr) {
  conv2_ = register_module("conv2", conv3x3(out_channels, out_channels, 1));
  bn2_ = register_module("bn2", cctorch::nn::BatchNorm2d(out_channels));
}

at::Tensor BlockImpl::forward(const at::Tensor& x) {
  const at::Tensor y = bn2_(conv2_(bn1_(conv1_(x)).relu_()));
  if (stride_ == 1 && zero_channels_ == 0) return (y + x).relu_();
  constexpr int64_t end = std::numeric_limits<int64_t>::max();
  const at::Tensor subsampled = x.slice(2, 0, end, stride_).slice(3, 0, end, stride_);
  return (y + at::constant_pad_nd(subsampled, {0, 0, 0, 0, zero_channels_, zero_channels_})).relu_();
}

ChannelGraph::Channels BlockImpl::describe(ChannelGraph& graph, const std::string& path,
                                           const ChannelGraph::Channels& x) const {
  auto y = graph.layer(path + ".conv1", LayerKind::conv2d, x, out_channels_);
  y = graph.layer(path + ".bn1", LayerKind::batch_norm2d, y, out_channels_);
  y = graph.layer(path + ".conv2", LayerKind::conv2d, y, out_channels_);
  y = graph.layer(path + ".bn2", LayerKind::batch_norm2d, y, out_channels_);
  if (zero_channels_ == 0) return graph.join(y, x);
  // The zeros stay: forward() pads with a fixed number of them.
  return graph.join(y, ChannelGraph::concat({graph.input(zero_channels_), x, graph.input(zero_channels_)}));
}

ResNetImpl::ResNetImpl(int64_t blocks, int64_t classes)
    : classes_(classes),
      conv1_(register_module("conv1", conv3x3(1, stem_channels, 1))),
      bn1_(register_module("bn1", cctorch::nn::BatchNorm2d(stem_channels))),
      linear_(nullptr) {
  int64_t channels = stem_channels;
  for (int64_t stage = 0; stage < 3; ++stage) {
    torch::nn::Sequential layer;
    const int64_t width = stem_channels << stage;
    for (int64_t i = 0; i < blocks; ++i) {
      layer->push_back(Block(channels, width, i == 0 && stage > 0 ? 2 : 1));
      channels = width;
    }
    stages_.push_back(register_module(fmt::format("layer{}", stage + 1), layer));
  }
  linear_ = register_module("linear", cctorch::nn::Linear(channels, classes));
}

at::Tensor ResNetImpl::forward(const at::Tensor& x) {
  at::Tensor y = bn1_(conv1_(x)).relu_();
  for (torch::nn::Sequential& stage : stages_) y = stage->forward(y);
  return linear_(y.mean({2, 3}));
}

void ResNetImpl::synchronize(const cctorch::distributed::Ranks& ranks) {
  for (const auto& module : modules(/*include_self=*/false)) {
    if (auto* const norm = module->as<cctorch::nn::BatchNorm2d>()) norm->synchronize(ranks);
  }
}

ChannelGraph ResNetImpl::channel_graph() const {
  ChannelGraph graph;
  auto y = graph.layer("conv1", LayerKind::conv2d, graph.input(1), stem_channels);
  y = graph.layer("bn1", LayerKind::batch_norm2d, y, stem_channels);
  for (size_t stage = 0; stage < stages_.size(); ++stage) {
    for (size_t i = 0; i < stages_[stage]->size(); ++i) {
      const std::string path = fmt::format("layer{}.{}", stage + 1, i);
      y = stages_[stage]->at<BlockImpl>(i).describe(graph, path, y);
    }
  }
  graph.pin(graph.layer("linear", LayerKind::linear, y, classes_));
  return graph;
}
