// What is left of a residual branch: layers that read nothing.
#include <gtest/gtest.h>
#include <torch/nn/modules/conv.h>
#include <torch/optim/adamw.h>
#include <torch/serialize.h>

#include <sstream>

#include "tiny_net.h"

namespace cctorch {
namespace {

LayerPlan reading_nothing(const std::string& name, LayerKind kind, int64_t in, int64_t out,
                          const std::vector<int64_t>& kept_out) {
  LayerPlan layer = LayerPlan::unchanged(name, kind, in, out);
  layer.kept_in.clear();
  layer.kept_out = kept_out;
  return layer;
}

TEST(Branch, AConvolutionThatReadsNothingGivesItsBiasWhereItGaveItsOutput) {
  for (const bool with_bias : {true, false}) {
    const auto options = torch::nn::Conv2dOptions(4, 5, {3, 2}).stride({2, 1}).padding({1, 0}).dilation({1, 2});
    torch::nn::Conv2d reference(torch::nn::Conv2dOptions(options).bias(with_bias));
    nn::Conv2d layer(torch::nn::Conv2dOptions(options).bias(with_bias));
    const at::Tensor x = torch::randn({2, 4, 9, 7});
    const at::Tensor bias = with_bias ? layer->bias.detach().clone() : torch::zeros(5);
    layer->compress(reading_nothing("layer", LayerKind::conv2d, 4, 5, {1, 4}));
    const at::Tensor expected = torch::zeros_like(reference(x)).add(bias.view({1, -1, 1, 1}));
    const at::Tensor kept = expected.index_select(1, torch::tensor({1, 4}, torch::kLong));
    EXPECT_TRUE(torch::equal(layer(x), kept));
    EXPECT_TRUE(torch::equal(layer(x.narrow(1, 0, 0)), kept)) << "whatever arrives";
    EXPECT_EQ(layer->named_parameters().keys(), std::vector<std::string>{"bias"});
    layer(x).sum().backward();
    EXPECT_TRUE(torch::equal(layer->bias.grad(), torch::full({2}, kept.numel() / 2.0)));
  }
}

TEST(Branch, AGroupedConvolutionGoesAsAWhole) {
  nn::Conv2d layer(torch::nn::Conv2dOptions(4, 6, 3).groups(2));
  const at::Tensor bias = layer->bias.detach().clone();
  layer->compress(reading_nothing("layer", LayerKind::conv2d, 4, 6, {0, 5}));
  const at::Tensor kept = bias.index_select(0, torch::tensor({0, 5}, torch::kLong));
  EXPECT_TRUE(torch::equal(layer(torch::randn({2, 4, 5, 5})), kept.view({1, 2, 1, 1}).expand({2, 2, 3, 3})));
}

TEST(Branch, WithoutOutputsNoChannelsAreLeft) {
  nn::Conv2d conv(4, 6, 3);
  nn::Linear linear(4, 6);
  nn::BatchNorm2d norm(4);
  conv->compress(reading_nothing("conv", LayerKind::conv2d, 4, 6, {}));
  linear->compress(reading_nothing("linear", LayerKind::linear, 4, 6, {}));
  norm->compress(reading_nothing("norm", LayerKind::batch_norm2d, 4, 4, {}));
  EXPECT_EQ(norm(conv(torch::randn({2, 4, 9, 7}))).sizes(), (std::vector<int64_t>{2, 0, 7, 5}));
  EXPECT_EQ(linear(torch::randn({2, 3, 4})).sizes(), (std::vector<int64_t>{2, 3, 0}));
  EXPECT_TRUE(conv->parameters().empty() && linear->parameters().empty() && norm->parameters().empty());
}

TEST(Branch, ALinearLayerAndANormalizationGiveTheirBias) {
  nn::Linear linear(4, 3);
  const at::Tensor bias = linear->bias.detach().clone();
  linear->compress(reading_nothing("linear", LayerKind::linear, 4, 3, {0, 2}));
  EXPECT_TRUE(torch::equal(linear(torch::randn({2, 5, 4})),
                           bias.index_select(0, torch::tensor({0, 2}, torch::kLong)).expand({2, 5, 2})));
  nn::BatchNorm2d norm(3);
  {
    const torch::NoGradGuard no_grad;
    norm->bias.copy_(torch::tensor({1.0, 2.0, 3.0}));
  }
  norm->compress(reading_nothing("norm", LayerKind::batch_norm2d, 3, 3, {1, 2}));
  for (const bool training : {true, false}) {
    norm->train(training);
    EXPECT_TRUE(torch::equal(norm(torch::randn({2, 0, 4, 4})),
                             torch::tensor({2.0, 3.0}).view({1, 2, 1, 1}).expand({2, 2, 4, 4})));
  }
  EXPECT_EQ(norm->named_parameters().keys(), std::vector<std::string>{"bias"});
}

TEST(Branch, AConstantMayBeChangedInPlaceAndHasTheLayoutAndDtypeOfItsInput) {
  nn::Conv2d conv(torch::nn::Conv2dOptions(4, 3, 3).padding(1));
  const at::Tensor bias = conv->bias.detach().clone();
  conv->compress(reading_nothing("conv", LayerKind::conv2d, 4, 3, {0, 1, 2}));
  for (const at::MemoryFormat format : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
    const at::Tensor x = torch::ones({2, 4, 5, 6}).contiguous(format);
    at::Tensor y = conv(x);
    EXPECT_TRUE(y.is_contiguous(format));
    y += 1;
    EXPECT_TRUE(torch::equal(y, (bias + 1).view({1, 3, 1, 1}).expand({2, 3, 5, 6})));
    EXPECT_EQ(conv(x.to(torch::kBFloat16)).scalar_type(), torch::kBFloat16);
  }
  EXPECT_TRUE(torch::equal(conv->bias, bias));
}

struct ResidualImpl : torch::nn::Cloneable<ResidualImpl> {
  ResidualImpl() { ResidualImpl::reset(); }
  void reset() override {
    const auto options = [](int64_t in, int64_t out) {
      return torch::nn::Conv2dOptions(in, out, 3).padding(1).bias(false);
    };
    stem = register_module("stem", nn::Conv2d(options(3, 6)));
    conv1 = register_module("conv1", nn::Conv2d(options(6, 8)));
    bn1 = register_module("bn1", nn::BatchNorm2d(8));
    conv2 = register_module("conv2", nn::Conv2d(options(8, 6)));
    bn2 = register_module("bn2", nn::BatchNorm2d(6));
    linear = register_module("linear", nn::Linear(6, 4));
  }
  at::Tensor forward(const at::Tensor& x) {
    const at::Tensor shortcut = stem(x);
    const at::Tensor y = bn2(conv2(bn1(conv1(shortcut)).relu()));
    return linear((shortcut + y).relu().mean({2, 3}));
  }
  static ChannelGraph channel_graph() {
    ChannelGraph graph;
    const auto shortcut = graph.layer("stem", LayerKind::conv2d, graph.input(3), 6);
    auto y = graph.layer("conv1", LayerKind::conv2d, shortcut, 8);
    y = graph.layer("bn1", LayerKind::batch_norm2d, y, 8);
    y = graph.layer("conv2", LayerKind::conv2d, y, 6);
    y = graph.layer("bn2", LayerKind::batch_norm2d, y, 6);
    graph.pin(graph.layer("linear", LayerKind::linear, graph.join(shortcut, y), 4));
    return graph;
  }
  nn::Conv2d stem{nullptr}, conv1{nullptr}, conv2{nullptr};
  nn::BatchNorm2d bn1{nullptr}, bn2{nullptr};
  nn::Linear linear{nullptr};
};
TORCH_MODULE(Residual);

// Without the branch, and two of the stream's channels.
CompressionPlan plan_without_branch() {
  LayerPlan linear = LayerPlan::unchanged("linear", LayerKind::linear, 6, 4);
  linear.kept_in = {0, 1, 3, 5};
  CompressionPlan plan{.method = "test", .target = 0.0, .layers = {linear}};
  plan.layers.push_back(reading_nothing("conv1", LayerKind::conv2d, 6, 8, {}));
  plan.layers.push_back(reading_nothing("bn1", LayerKind::batch_norm2d, 8, 8, {}));
  plan.layers.push_back(reading_nothing("conv2", LayerKind::conv2d, 8, 6, {}));
  plan.layers.push_back(reading_nothing("bn2", LayerKind::batch_norm2d, 6, 6, {0, 1, 2, 3, 4, 5}));
  ResidualImpl::channel_graph().resolve(plan);
  return plan;
}

TEST(Branch, ResolvingKeepsItAway) {
  const CompressionPlan plan = plan_without_branch();
  const std::vector<int64_t> stream = {0, 1, 3, 5};
  EXPECT_EQ(plan.find("stem")->kept_out, stream);
  EXPECT_EQ(plan.find("bn2")->kept_out, stream);
  EXPECT_TRUE(plan.find("bn2")->reads_nothing());
  for (const char* name : {"conv1", "bn1", "conv2"}) EXPECT_TRUE(plan.find(name)->kept_out.empty()) << name;
  EXPECT_EQ(CompressionPlan::from_json(plan.to_json()), plan);
  CompressionPlan again = plan;
  ResidualImpl::channel_graph().resolve(again);
  EXPECT_EQ(again, plan);
}

TEST(Branch, TheModelGoesOnWithoutIt) {
  Residual model;
  model->bn2->bias.data().copy_(torch::randn(6));
  const at::Tensor x = torch::randn({4, 3, 6, 6});
  at::Tensor expected;
  {
    const torch::NoGradGuard no_grad;
    const at::Tensor kept = torch::tensor({0, 1, 3, 5}, torch::kLong);
    const at::Tensor stream = (model->stem(x) + model->bn2->bias.view({1, -1, 1, 1})).relu().mean({2, 3});
    expected =
        at::linear(stream.index_select(1, kept), model->linear->weight.index_select(1, kept), model->linear->bias);
  }
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(0.01));
  const auto step = [&] {
    optimizer.zero_grad();
    model->forward(x).square().sum().backward();
    optimizer.step();
  };
  cctorch::apply(*model, plan_without_branch(), &optimizer);
  EXPECT_TRUE(at::allclose(model->forward(x), expected, 1e-5, 1e-6));
  EXPECT_EQ(optimizer.param_groups().front().params().size(), model->parameters().size());
  step();
  for (const auto& parameter : model->named_parameters()) {
    EXPECT_TRUE(parameter.value().grad().defined()) << parameter.key();
  }
  EXPECT_FALSE(at::allclose(model->forward(x), expected));

  const auto copy = std::dynamic_pointer_cast<ResidualImpl>(model->clone());
  EXPECT_TRUE(torch::equal(copy->forward(x), model->forward(x)));
  std::stringstream file;
  torch::save(model, file);
  Residual loaded;
  cctorch::apply(*loaded, plan_without_branch());
  torch::load(loaded, file);
  EXPECT_TRUE(torch::equal(loaded->forward(x), model->forward(x)));
}

TEST(Branch, ItsStateIsItsBias) {
  Residual model;
  cctorch::apply(*model, plan_without_branch());
  const Safetensors::Tensors state = state_dict(*model);
  std::vector<std::string> names;
  for (const auto& entry : state) names.push_back(entry.first);
  EXPECT_EQ(names, (std::vector<std::string>{"bn2.bias", "linear.bias", "linear.weight", "stem.weight"}));
  Residual other;
  cctorch::apply(*other, plan_without_branch());
  load_state_dict(*other, state);
  const at::Tensor x = torch::randn({4, 3, 6, 6});
  EXPECT_TRUE(torch::equal(other->forward(x), model->forward(x)));
}

// relu() gives a tensor without channels in the layout of PyTorch's default.
TEST(Branch, AConstantHasTheLayoutOfTheModelThatItWasCompressedIn) {
  for (const at::MemoryFormat format : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
    Residual model;
    for (at::Tensor& parameter : model->parameters()) {
      if (parameter.dim() == 4) parameter.set_data(parameter.contiguous(format));
    }
    cctorch::apply(*model, plan_without_branch());
    const auto copy = std::dynamic_pointer_cast<ResidualImpl>(model->clone());
    for (Residual each : {model, Residual(copy)}) {
      const at::Tensor x = torch::randn({4, 3, 6, 6}).contiguous(format);
      const at::Tensor y = each->bn2(each->conv2(each->bn1(each->conv1(each->stem(x))).relu()));
      EXPECT_EQ(y.sizes(), (std::vector<int64_t>{4, 4, 6, 6}));
      EXPECT_TRUE(y.is_contiguous(format)) << format;
    }
  }
}

TEST(Branch, ItsWorkIsGone) {
  Residual model;
  const auto specs = layer_specs(*model, [&] { model->forward(torch::randn({2, 3, 6, 6})); });
  const CompressionPlan plan = plan_without_branch();
  EXPECT_EQ(final_macs(specs, plan), 3 * 4 * 9 * 36 + 4 * 4);
  EXPECT_EQ(nominal_macs(specs, plan), 3 * 6 * 9 * 36 + 4 * 4);
}

}  // namespace
}  // namespace cctorch
