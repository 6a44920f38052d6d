#include <gtest/gtest.h>
#include <torch/optim/sgd.h>

#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tests/cpp/refusal.h"
#include "tiny_net.h"

namespace cctorch {
namespace {

using namespace regularize;

NamedParameters weights_of(TinyNet& model) {
  NamedParameters weights;
  for (const char* const name : {"conv1.weight", "conv2.weight", "conv3.weight"})
    weights.emplace_back(name, model->named_parameters()[name]);
  return weights;
}

// Of one convolution of TinyNet, by the kernels that run.
int64_t macs_of(const nn::Conv2dImpl& layer, int64_t outputs_high, LowRankLayout layout) {
  const int64_t stride = (*layer.options.stride())[0], small = outputs_high * outputs_high;
  const int64_t before = layout == LowRankLayout::channel ? small : small * stride * stride;
  // 1 x 3 strides in one dimension, 1 x 1 in none; with a core, that strides and `second` comes after it.
  const int64_t first = layout == LowRankLayout::spatial ? before / stride : before;
  return layer.first.numel() * first + layer.second.numel() * small +
         (layer.core.defined() ? layer.core.numel() * small : 0);
}

class RegularizedPlanTest : public testing::TestWithParam<LowRankLayout> {
 protected:
  std::shared_ptr<Regularizer> regularizer() const {
    if (GetParam() == LowRankLayout::tucker) return std::make_shared<Tucker2>(RanksOrRatio{.ratio = 2.0});
    return std::make_shared<SVD>(RankOrRatio{.ratio = 2.0},
                                 GetParam() == LowRankLayout::spatial ? MatrixView::spatial : MatrixView::channel);
  }
};

TEST_P(RegularizedPlanTest, LayersAreAsSmallAsQSaysAndComputeTheSame) {
  TinyNet model;
  const Batch batch = random_batch();
  const auto specs = layer_specs(*model, [&] { model->forward(batch.x); });
  model->eval();
  const auto q = regularizer();
  const Outcome outcome = q->apply(weights_of(model));
  const at::Tensor expected = model->forward(batch.x);
  const CompressionPlan found = regularize::plan(*model, weights_of(model), *q);
  EXPECT_EQ(found, CompressionPlan::from_json(found.to_json()));
  ASSERT_EQ(found.layers.size(), 3);
  cctorch::apply(*model, found);
  EXPECT_LT((model->forward(batch.x) - expected).abs().max().item<double>(), 1e-9);

  int64_t entries = 0, macs = model->linear->weight.numel();
  for (const auto& [layer, outputs] : {std::pair(model->conv1, 6), {model->conv2, 6}, {model->conv3, 3}}) {
    ASSERT_EQ(layer->plan()->layout, GetParam());
    for (const auto& [name, weight] : layer->weights()) entries += weight.numel();
    macs += macs_of(*layer, outputs, GetParam());
  }
  EXPECT_EQ(entries * 64, outcome.bits);
  EXPECT_EQ(final_macs(specs, found), macs);
}

TEST_P(RegularizedPlanTest, FactorsTrainAreClonedAndQuantized) {
  TinyNet model;
  const Batch batch = random_batch();
  torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
  model->loss(batch.x, batch.labels).backward();
  optimizer.step();
  const auto q = regularizer();
  q->apply(weights_of(model));
  CompressionPlan found = regularize::plan(*model, weights_of(model), *q);
  cctorch::apply(*model, found, &optimizer);
  std::set<const void*> optimized;
  for (const at::Tensor& parameter : optimizer.param_groups()[0].params())
    optimized.insert(parameter.unsafeGetTensorImpl());
  for (const auto& [name, parameter] : model->conv3->weights()) {
    EXPECT_TRUE(optimized.contains(parameter.unsafeGetTensorImpl())) << name;
    EXPECT_TRUE(parameter.requires_grad());
  }
  const auto copy = std::dynamic_pointer_cast<nn::Conv2dImpl>(model->conv3->clone());
  const at::Tensor x = torch::randn({2, 8, 6, 6}, torch::kDouble);
  EXPECT_TRUE(torch::equal(copy->forward(x), model->conv3->forward(x)));

  optimizer.zero_grad();
  model->loss(batch.x, batch.labels).backward();
  for (const auto& [name, parameter] : model->conv3->weights())
    EXPECT_GT(parameter.grad().abs().sum().item<double>(), 0) << name;
  optimizer.step();

  for (LayerPlan& layer : found.layers) layer.bits = 4;
  prepare(*model, found);
  EXPECT_EQ(model->conv3->constraints().size(), GetParam() == LowRankLayout::tucker ? 3 : 2);
}

TEST_P(RegularizedPlanTest, OfWeightsThatQWouldStillChangeThereIsNone) {
  TinyNet model;
  const auto q = regularizer();
  const std::string text = refusal([&] { regularize::plan(*model, weights_of(model), *q); });
  EXPECT_NE(text.find("layer 'conv1'"), std::string::npos) << text;
  EXPECT_NE(text.find("finish()"), std::string::npos) << text;
}

INSTANTIATE_TEST_SUITE_P(Layouts, RegularizedPlanTest,
                         testing::Values(LowRankLayout::channel, LowRankLayout::spatial, LowRankLayout::tucker),
                         [](const auto& info) { return std::string(to_string(info.param)); });

TEST(RegularizedPlan, InputsOfZerosGoAndWithThemTheFiltersNobodyReads) {
  TinyNet model;
  const Batch batch = random_batch();
  model->eval();
  ChannelPruning q(0.5, 1);
  const NamedParameters weights = {{"conv2.weight", model->conv2->weight}, {"conv3.weight", model->conv3->weight}};
  q.apply(weights);
  const at::Tensor expected = model->forward(batch.x);
  CompressionPlan found = regularize::plan(*model, weights, q);
  ASSERT_EQ(found.layers.size(), 2);
  EXPECT_EQ(found.find("conv2")->kept_in.size(), 4);
  EXPECT_EQ(found.find("conv2")->gather, found.find("conv2")->kept_in);
  TinyNetImpl::channel_graph().resolve(found);
  EXPECT_TRUE(found.find("conv2")->gather.empty());
  cctorch::apply(*model, found);
  EXPECT_EQ(model->conv1->weight.size(0), 4);
  EXPECT_EQ(model->conv3->weight.size(1), 4);
  EXPECT_LT((model->forward(batch.x) - expected).abs().max().item<double>(), 1e-12);
}

TEST(RegularizedPlan, ALayerOfZerosKeepsOneInput) {
  TinyNet model;
  ChannelPruning q(0.5, 1);
  const torch::NoGradGuard no_grad;
  model->conv2->weight.zero_();
  const CompressionPlan found = regularize::plan(*model, {{"conv2.weight", model->conv2->weight}}, q);
  EXPECT_EQ(found.find("conv2")->kept_in, std::vector<int64_t>{0});
}

TEST(RegularizedPlan, WhatComesAfterAFactorizationDecides) {
  const auto svd = [] { return std::make_shared<SVD>(RankOrRatio{.ratio = 2.0}); };
  const auto rank_after = [](std::vector<std::shared_ptr<Regularizer>> parts) {
    TinyNet model;
    Compose q(std::move(parts));
    q.apply({{"conv2.weight", model->conv2->weight}});
    const CompressionPlan found = regularize::plan(*model, {{"conv2.weight", model->conv2->weight}}, q);
    return !found.layers.empty() && found.layers[0].rank.has_value();
  };
  EXPECT_TRUE(rank_after({std::make_shared<MagnitudePruning>(0.3), svd()}));
  EXPECT_FALSE(rank_after({svd(), std::make_shared<MagnitudePruning>(0.3)}));
  EXPECT_FALSE(rank_after({svd(), std::make_shared<UniformQuantization>(4)}));
}

TEST(RegularizedPlan, OnlyPruningOfInputsGivesThemUp) {
  TinyNet model;
  {
    const torch::NoGradGuard no_grad;
    model->conv2->weight.index_fill_(1, torch::tensor({1, 4}), 0);
  }
  for (const std::shared_ptr<Regularizer>& q :
       {std::shared_ptr<Regularizer>(std::make_shared<MagnitudePruning>(0.3)), {std::make_shared<NMPruning>(2, 4)}}) {
    EXPECT_TRUE(regularize::plan(*model, {{"conv2.weight", model->conv2->weight}}, *q).layers.empty());
  }
}

TEST(RegularizedPlan, OfFewInputsThatAreLeftACoreReadsAll) {
  TinyNet model;
  model->eval();
  const NamedParameters weights = {{"conv3.weight", model->conv3->weight}};
  Compose q({std::make_shared<ChannelPruning>(0.5, 1), std::make_shared<Tucker2>(RanksOrRatio{.ranks = {{3, 5}}})});
  q.apply(weights);
  const Batch batch = random_batch();
  const at::Tensor expected = model->forward(batch.x);
  const CompressionPlan found = regularize::plan(*model, weights, q);
  ASSERT_EQ(found.layers.size(), 1);
  EXPECT_EQ(found.layers[0].kept_in.size(), 4);
  EXPECT_EQ(found.layers[0].layout, LowRankLayout::channel);
  EXPECT_EQ(found.layers[0].rank, 3);
  cctorch::apply(*model, found);
  EXPECT_LT((model->forward(batch.x) - expected).abs().max().item<double>(), 1e-9);
}

TEST(RegularizedPlan, LeavesStateGroupsAndCompressedLayersAlone) {
  TinyNet model;
  SVD q(RankOrRatio{.rank = 2});
  q.apply(weights_of(model));
  const size_t remembered = q.state_dict().size();
  const CompressionPlan found = regularize::plan(*model, weights_of(model), q);
  EXPECT_EQ(q.state_dict().size(), remembered);
  cctorch::apply(*model, {.method = "", .target = 0.0, .layers = {*found.find("conv2")}});
  NamedParameters left = {{"conv2.first", model->conv2->first}, {"conv3.weight", model->conv3->weight}};
  EXPECT_EQ(regularize::plan(*model, left, q).layers.size(), 1);

  torch::nn::Module grouped;
  grouped.register_module("conv", nn::Conv2d(torch::nn::Conv2dOptions(8, 8, 3).groups(2)));
  const auto parameters = grouped.named_parameters().pairs();
  q.apply(parameters);
  EXPECT_TRUE(regularize::plan(grouped, parameters, q).layers.empty());
}

TEST(RegularizedPlan, FactorsTheWeightsOfAnLstm) {
  torch::nn::Module model;
  const auto lstm = model.register_module("lstm", nn::LSTM(6, 8));
  const auto parameters = model.named_parameters().pairs();
  SVD q(RankOrRatio{.rank = 2});
  q.apply(parameters);
  const at::Tensor x = torch::randn({5, 3, 6});
  const at::Tensor expected = std::get<0>(lstm->forward(x));
  const CompressionPlan found = regularize::plan(model, parameters, q);
  EXPECT_EQ(found.layers.size(), 2);
  cctorch::apply(model, found);
  EXPECT_LT((std::get<0>(lstm->forward(x)) - expected).abs().max().item<double>(), 1e-5);
}

}  // namespace
}  // namespace cctorch
