#pragma once

#include <cctorch/cctorch.h>
#include <torch/types.h>

namespace cctorch {

// Three convolutions, the last with stride 2, and a classifier; in float64.
struct TinyNetImpl : torch::nn::Module {
  TinyNetImpl() {
    const auto conv = [](int64_t in, int64_t out, int64_t stride) {
      return nn::Conv2d(torch::nn::Conv2dOptions(in, out, 3).stride(stride).padding(1).bias(false));
    };
    conv1 = register_module("conv1", conv(3, 8, 1));
    bn1 = register_module("bn1", nn::BatchNorm2d(8));
    conv2 = register_module("conv2", conv(8, 8, 1));
    bn2 = register_module("bn2", nn::BatchNorm2d(8));
    conv3 = register_module("conv3", conv(8, 12, 2));
    linear = register_module("linear", nn::Linear(12, 4));
    to(torch::kDouble);
  }

  at::Tensor forward(const at::Tensor& x) {
    const at::Tensor stem = bn1(conv1(x)).relu();
    const at::Tensor y = bn2(conv2(stem)).relu();
    return linear(conv3(y).relu().mean({2, 3}));
  }

  at::Tensor loss(const at::Tensor& x, const at::Tensor& labels) { return at::cross_entropy_loss(forward(x), labels); }

  static ChannelGraph channel_graph() {
    ChannelGraph graph;
    auto y = graph.layer("conv1", LayerKind::conv2d, graph.input(3), 8);
    y = graph.layer("bn1", LayerKind::batch_norm2d, y, 8);
    y = graph.layer("conv2", LayerKind::conv2d, y, 8);
    y = graph.layer("bn2", LayerKind::batch_norm2d, y, 8);
    y = graph.layer("conv3", LayerKind::conv2d, y, 12);
    graph.pin(graph.layer("linear", LayerKind::linear, y, 4));
    return graph;
  }

  nn::Conv2d conv1{nullptr}, conv2{nullptr}, conv3{nullptr};
  nn::BatchNorm2d bn1{nullptr}, bn2{nullptr};
  nn::Linear linear{nullptr};
};
TORCH_MODULE(TinyNet);

struct Batch {
  at::Tensor x, labels;
};

inline Batch random_batch(int64_t examples = 5) {
  return {torch::randn({examples, 3, 6, 6}, torch::kDouble), torch::randint(4, {examples}, torch::kLong)};
}

inline void copy_state(TinyNet& to, const TinyNet& from) {
  torch::NoGradGuard no_grad;
  for (auto& parameter : to->named_parameters()) parameter.value().copy_(from->named_parameters()[parameter.key()]);
  for (auto& buffer : to->named_buffers()) buffer.value().copy_(from->named_buffers()[buffer.key()]);
}

}  // namespace cctorch
