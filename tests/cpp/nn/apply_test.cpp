#include <gtest/gtest.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/rnn.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/lbfgs.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>
#include <torch/serialize.h>

#include <functional>
#include <memory>
#include <sstream>
#include <utility>

#include "tests/cpp/refusal.h"
#include "tiny_net.h"

namespace cctorch {
namespace {

const std::vector<int64_t> kept = {0, 2, 3, 6};  // of conv2's inputs
const std::vector<int64_t> dropped = {1, 4, 5, 7};

at::Tensor index(const std::vector<int64_t>& positions) { return torch::tensor(positions, torch::kLong); }

CompressionPlan narrowing_plan() {
  LayerPlan layer = LayerPlan::unchanged("conv2", LayerKind::conv2d, 8, 8);
  layer.kept_in = kept;
  CompressionPlan plan{.method = "test", .target = 0.0, .layers = {layer}};
  TinyNetImpl::channel_graph().resolve(plan);
  return plan;
}

// conv3 reads all of its inputs at rank 5 on top of that.
CompressionPlan mixed_plan() {
  CompressionPlan plan = narrowing_plan();
  LayerPlan layer = LayerPlan::unchanged("conv3", LayerKind::conv2d, 8, 12);
  layer.rank = 5;
  plan.layers.push_back(layer);
  return plan;
}

void mask_conv2(TinyNet& model) {
  torch::NoGradGuard no_grad;
  model->conv2->weight.index_fill_(1, index(dropped), 0);
}

TEST(Apply, EqualsTheMaskedAndProjectedModel) {
  TinyNet model, reference;
  const Batch batch = random_batch();
  model->forward(batch.x);  // running statistics that differ between channels
  copy_state(reference, model);
  mask_conv2(reference);
  {
    torch::NoGradGuard no_grad;
    const auto [u, s, v] = torch::linalg_svd(reference->conv3->weight.flatten(1), /*full_matrices=*/false);
    const at::Tensor low = u.narrow(1, 0, 5).matmul(s.narrow(0, 0, 5).diag()).matmul(v.narrow(0, 0, 5));
    reference->conv3->weight.copy_(low.view_as(reference->conv3->weight));
  }
  cctorch::apply(*model, mixed_plan());
  EXPECT_EQ(model->conv1->weight.size(0), 4);
  EXPECT_EQ(model->bn1->running_mean.size(0), 4);
  for (const bool training : {true, false}) {
    model->train(training);
    reference->train(training);
    EXPECT_LT((model->forward(batch.x) - reference->forward(batch.x)).abs().max().item<double>(), 1e-10);
  }
}

TEST(Apply, WorkFallsAsThePlanSays) {
  TinyNet model;
  const Batch batch = random_batch();
  const auto specs = layer_specs(*model, [&] { model->forward(batch.x); });
  const CompressionPlan plan = mixed_plan();
  cctorch::apply(*model, plan);
  int64_t macs = model->linear->weight.numel();
  macs += (model->conv1->weight.numel() + model->conv2->weight.numel()) * 36;
  macs += (model->conv3->first.numel() + model->conv3->second.numel()) * 9;
  EXPECT_EQ(final_macs(specs, plan), macs);
  EXPECT_LT(macs, dense_macs(specs));
}

TEST(Apply, LeavesTorchsLstmsAloneAndRefusesToDecomposeThem) {
  TinyNet model;
  model->register_module("lstm", torch::nn::LSTM(6, 4));
  LayerPlan lstm = LayerPlan::unchanged("lstm.weight_ih_l0", LayerKind::lstm, 6, 16);
  cctorch::apply(*model, {.method = "", .target = 0.0, .layers = {lstm}});
  lstm.rank = 2;
  const std::string text = refusal([&] { cctorch::apply(*model, {.method = "", .target = 0.0, .layers = {lstm}}); });
  EXPECT_NE(text.find("'lstm.weight_ih_l0' is a weight of a torch::nn::LSTMImpl, which apply() cannot"),
            std::string::npos)
      << text;
}

using MakeOptimizer = std::function<std::unique_ptr<torch::optim::Optimizer>(TinyNet&)>;

class OptimizerTest : public testing::TestWithParam<MakeOptimizer> {};

TEST_P(OptimizerTest, NextStepEqualsThatOfTheMaskedModel) {
  TinyNet model, reference;
  copy_state(reference, model);
  const auto optimizer = GetParam()(model), reference_optimizer = GetParam()(reference);
  const auto step = [](TinyNet& net, torch::optim::Optimizer& opt, const Batch& batch) {
    opt.zero_grad();
    net->loss(batch.x, batch.labels).backward();
    opt.step();
  };
  for (int i = 0; i < 3; ++i) {
    const Batch batch = random_batch();
    step(model, *optimizer, batch);
    step(reference, *reference_optimizer, batch);
  }
  cctorch::apply(*model, narrowing_plan(), optimizer.get());
  mask_conv2(reference);
  EXPECT_EQ(optimizer->parameters().size(), model->parameters().size());
  EXPECT_EQ(optimizer->state().size(), model->parameters().size());
  const Batch batch = random_batch();
  step(model, *optimizer, batch);
  step(reference, *reference_optimizer, batch);

  const auto near = [](const at::Tensor& a, const at::Tensor& b) { return (a - b).abs().max().item<double>(); };
  EXPECT_LT(near(model->conv1->weight, reference->conv1->weight.index_select(0, index(kept))), 1e-9);
  EXPECT_LT(near(model->bn1->bias, reference->bn1->bias.index_select(0, index(kept))), 1e-9);
  EXPECT_LT(near(model->conv2->weight, reference->conv2->weight.index_select(1, index(kept))), 1e-9);
  EXPECT_LT(near(model->linear->weight, reference->linear->weight), 1e-9);
}

TEST_P(OptimizerTest, FactorsTakeTheWeightsPlaceWithoutState) {
  TinyNet model;
  const auto optimizer = GetParam()(model);
  const Batch batch = random_batch();
  model->loss(batch.x, batch.labels).backward();
  optimizer->step();
  cctorch::apply(*model, mixed_plan(), optimizer.get());
  const auto expected = model->parameters();
  ASSERT_EQ(optimizer->parameters().size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_TRUE(optimizer->parameters()[i].is_same(expected[i])) << i;
  EXPECT_EQ(optimizer->state().size(), expected.size() - 2);
  const at::Tensor before = model->conv3->first.detach().clone();
  model->loss(batch.x, batch.labels).backward();
  optimizer->step();
  EXPECT_FALSE(torch::equal(before, model->conv3->first));
}

INSTANTIATE_TEST_SUITE_P(All, OptimizerTest,
                         testing::Values(
                             [](TinyNet& model) -> std::unique_ptr<torch::optim::Optimizer> {
                               return std::make_unique<torch::optim::SGD>(
                                   model->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9).weight_decay(1e-2));
                             },
                             [](TinyNet& model) -> std::unique_ptr<torch::optim::Optimizer> {
                               return std::make_unique<torch::optim::Adam>(
                                   model->parameters(), torch::optim::AdamOptions(0.01).amsgrad(true));
                             },
                             [](TinyNet& model) -> std::unique_ptr<torch::optim::Optimizer> {
                               return std::make_unique<torch::optim::AdamW>(model->parameters(),
                                                                            torch::optim::AdamWOptions(0.01));
                             }));

class RefusalTest : public testing::Test {
 protected:
  // The plan is refused with `text`, after a good entry, and the model is what it was.
  void expect_refused(const LayerPlan& bad, const std::string& text) {
    CompressionPlan plan = narrowing_plan();
    std::erase_if(plan.layers, [&](const LayerPlan& layer) { return layer.name == bad.name; });
    plan.layers.push_back(bad);
    const auto before = model->named_parameters();
    const std::string message = refusal([&] { cctorch::apply(*model, plan); });
    EXPECT_NE(message.find(text), std::string::npos) << message;
    for (const auto& parameter : model->named_parameters()) {
      EXPECT_TRUE(parameter.value().is_same(before[parameter.key()])) << parameter.key();
    }
    EXPECT_FALSE(model->conv2->plan());
  }

  TinyNet model;
};

TEST_F(RefusalTest, AnotherArchitecture) {
  LayerPlan unknown = LayerPlan::unchanged("layer1.0.conv1", LayerKind::conv2d, 8, 8);
  expect_refused(unknown, "no layer 'layer1.0.conv1', it has conv1, bn1, conv2, bn2, conv3, ...");
  expect_refused(LayerPlan::unchanged("conv3", LayerKind::conv2d, 8, 16),
                 "layer 'conv3' is a conv2d of 8 -> 12 channels, but the plan expects a conv2d of 8 -> 16");
  expect_refused(LayerPlan::unchanged("linear", LayerKind::conv2d, 12, 4), "layer 'linear' is a linear");
}

TEST_F(RefusalTest, WhatApplyCannotRebuild) {
  model->register_module("head", torch::nn::Conv2d(torch::nn::Conv2dOptions(12, 4, 1)));
  expect_refused(LayerPlan::unchanged("head", LayerKind::conv2d, 12, 4), "build the model with cctorch::nn::Conv2d");
  model->register_module("alias", model->conv2);
  expect_refused(LayerPlan::unchanged("alias", LayerKind::conv2d, 8, 8), "one module under two names");
}

TEST_F(RefusalTest, ACompressedModel) {
  cctorch::apply(*model, narrowing_plan());
  const std::string message = refusal([&] { cctorch::apply(*model, narrowing_plan()); });
  EXPECT_NE(message.find("is compressed already"), std::string::npos) << message;
}

TEST_F(RefusalTest, StateOfAnotherOptimizer) {
  torch::optim::RMSprop optimizer(model->parameters());
  const Batch batch = random_batch();
  model->loss(batch.x, batch.labels).backward();
  optimizer.step();
  const std::string message = refusal([&] { cctorch::apply(*model, narrowing_plan(), &optimizer); });
  EXPECT_NE(message.find("not that of SGD, Adam or AdamW"), std::string::npos) << message;
  EXPECT_FALSE(model->conv2->plan());
}

TEST(Apply, WhatTrainsNothingNeedsNoOptimizer) {
  TinyNet model, other;
  torch::optim::SGD optimizer(other->parameters(), 0.1);
  cctorch::apply(*model, {}, &optimizer);
  for (const at::Tensor& parameter : model->parameters()) parameter.set_requires_grad(false);
  cctorch::apply(*model, narrowing_plan(), &optimizer);
  EXPECT_TRUE(model->conv2->plan());
}

TEST_F(RefusalTest, AnOptimizerOfAnotherModel) {
  TinyNet other;
  torch::optim::SGD optimizer(other->parameters(), 0.1);
  const std::string message = refusal([&] { cctorch::apply(*model, narrowing_plan(), &optimizer); });
  EXPECT_NE(message.find("none of the model's parameters"), std::string::npos) << message;
  EXPECT_FALSE(model->conv2->plan());
}

// Its state is kept under the first parameter, which this plan leaves as it is.
TEST_F(RefusalTest, StateOfAllParametersTogether) {
  torch::optim::LBFGS optimizer(model->parameters());
  const Batch batch = random_batch();
  optimizer.step([&] {
    optimizer.zero_grad();
    at::Tensor loss = model->loss(batch.x, batch.labels);
    loss.backward();
    return loss;
  });
  CompressionPlan plan{.method = "by hand", .layers = {LayerPlan::unchanged("linear", LayerKind::linear, 12, 4)}};
  plan.layers[0].rank = 1;
  const std::string message = refusal([&] { cctorch::apply(*model, plan, &optimizer); });
  EXPECT_NE(message.find("the state of LBFGS"), std::string::npos) << message;
  EXPECT_FALSE(model->linear->plan());
}

TEST(Checkpoint, IsAPlanAndTensors) {
  TinyNet model;
  const CompressionPlan plan = mixed_plan();
  cctorch::apply(*model, plan);
  std::stringstream stream;
  torch::save(model, stream);

  TinyNet fresh;
  cctorch::apply(*fresh, CompressionPlan::from_json(plan.to_json()));
  torch::load(fresh, stream);
  const Batch batch = random_batch();
  model->eval();
  fresh->eval();
  EXPECT_TRUE(torch::equal(fresh->forward(batch.x), model->forward(batch.x)));
}

TEST(LayerSpecs, CountWhatTheForwardPassReaches) {
  TinyNet model;
  model->bn1->eval();
  const auto specs = layer_specs(*model, [&] { model->forward(random_batch().x); });
  ASSERT_EQ(specs.size(), 6u);
  EXPECT_EQ(specs[0].name, "conv1");
  EXPECT_EQ(specs[0].positions, 36);
  EXPECT_EQ(specs[4].name, "conv3");
  EXPECT_EQ(specs[4].positions, 9);
  EXPECT_EQ(specs[4].macs(), 8 * 12 * 9 * 9);
  EXPECT_EQ(specs[5].positions, 1);
  EXPECT_TRUE(model->is_training());
  EXPECT_TRUE(model->bn2->is_training());
  EXPECT_FALSE(model->bn1->is_training());
  EXPECT_EQ(model->bn2->num_batches_tracked.item<int64_t>(), 0);

  std::string names;
  for (const LayerSpec& spec : collaborative::participants(specs)) names += spec.name + " ";
  EXPECT_EQ(names, "conv2 conv3 ");
  EXPECT_EQ(layer_specs(*model, [&] { model->conv1(random_batch().x); }).size(), 1u);
}

TEST(MeanGradients, AreThoseOfTheMeanLoss) {
  TinyNet model;
  model->forward(random_batch().x);
  const std::vector<Batch> batches = {random_batch(5), random_batch(5), random_batch(2)};
  const auto specs = collaborative::participants(layer_specs(*model, [&] { model->forward(batches[0].x); }));
  size_t next = 0;
  const auto layers = collaborative::mean_gradients(*model, specs, [&]() -> std::optional<collaborative::BatchLoss> {
    if (next == batches.size()) return std::nullopt;
    const Batch& batch = batches[next++];
    return collaborative::BatchLoss{model->loss(batch.x, batch.labels), batch.x.size(0)};
  });
  EXPECT_TRUE(model->is_training());
  EXPECT_FALSE(model->conv2->weight.grad().defined());

  model->eval();
  at::Tensor loss = torch::zeros({}, torch::kDouble);
  for (const Batch& batch : batches) loss = loss + model->loss(batch.x, batch.labels) * batch.x.size(0) / 12;
  loss.backward();
  ASSERT_EQ(layers.size(), 2u);
  EXPECT_EQ(layers[1].spec.name, "conv3");
  EXPECT_LT((layers[0].gradient - model->conv2->weight.grad()).abs().max().item<double>(), 1e-14);
  EXPECT_LT((layers[1].gradient - model->conv3->weight.grad()).abs().max().item<double>(), 1e-14);
  EXPECT_TRUE(torch::equal(layers[1].weight, model->conv3->weight));
}

struct RecurrentImpl : torch::nn::Module {
  RecurrentImpl() {
    register_module("lstm", lstm);
    register_module("head", head);
  }
  at::Tensor loss(const at::Tensor& x, const at::Tensor& labels) {
    seen.emplace_back(lstm->is_training(), lstm->options.dropout());
    return torch::cross_entropy_loss(head->forward(std::get<0>(lstm->forward(x)).select(1, -1)), labels);
  }
  torch::nn::LSTM lstm{torch::nn::LSTMOptions(6, 8).num_layers(2).dropout(0.5).batch_first(true)};
  nn::Linear head{torch::nn::LinearOptions(8, 5)};
  std::vector<std::pair<bool, double>> seen;
};
TORCH_MODULE(Recurrent);

// cuDNN's recurrent layers have gradients in training mode alone: without their dropout these are those of evaluation.
TEST(MeanGradients, DifferentiateRecurrentLayersInTrainingWithoutDropout) {
  torch::manual_seed(0);
  Recurrent model;
  model->to(torch::kDouble);
  const at::Tensor x = torch::randn({3, 4, 6}, torch::kDouble), labels = torch::randint(5, {3}, torch::kLong);
  const auto specs = layer_specs(*model, [&] { model->loss(x, labels); });
  bool done = false;
  const auto layers = collaborative::mean_gradients(*model, specs, [&]() -> std::optional<collaborative::BatchLoss> {
    if (std::exchange(done, true)) return std::nullopt;
    return collaborative::BatchLoss{model->loss(x, labels), 3};
  });
  EXPECT_EQ(model->seen.back(), std::pair(true, 0.0));
  EXPECT_TRUE(model->lstm->is_training());
  EXPECT_EQ(model->lstm->options.dropout(), 0.5);
  model->eval();
  model->loss(x, labels).backward();
  EXPECT_TRUE(torch::allclose(layers.at(0).gradient, model->head->weight.grad()));
}

TEST(MeanGradients, RefuseACompressedLayerAndNoBatch) {
  TinyNet model;
  const auto specs = collaborative::participants(layer_specs(*model, [&] { model->forward(random_batch().x); }));
  const auto none = [] { return std::optional<collaborative::BatchLoss>(); };
  EXPECT_NE(refusal([&] { collaborative::mean_gradients(*model, specs, none); }).find("no batch"), std::string::npos);
  cctorch::apply(*model, mixed_plan());
  const std::string message = refusal([&] { collaborative::mean_gradients(*model, specs, none); });
  EXPECT_NE(message.find("layer 'conv2' is compressed already"), std::string::npos) << message;
}

TEST(ReestimateBatchNorm, AveragesTheStatisticsOfTheBatches) {
  TinyNet model;
  const std::vector<Batch> batches = {random_batch(), random_batch()};
  model->forward(batches[0].x);
  model->bn2->eval();
  size_t next = 0;
  reestimate_batch_norm(*model, [&] {
    if (next == batches.size()) return false;
    model->forward(batches[next++].x);
    return true;
  });
  EXPECT_TRUE(model->is_training());
  EXPECT_FALSE(model->bn2->is_training());
  EXPECT_EQ(model->bn1->options.momentum(), 0.1);
  const torch::NoGradGuard no_grad;
  at::Tensor mean = torch::zeros({8}, torch::kDouble), variance = torch::zeros({8}, torch::kDouble);
  for (const Batch& batch : batches) {
    const at::Tensor values = model->conv1->forward(batch.x).transpose(0, 1).flatten(1);
    mean += values.mean(1) / 2;
    variance += values.var(1, /*unbiased=*/true) / 2;
  }
  EXPECT_LT((model->bn1->running_mean - mean).abs().max().item<double>(), 1e-14);
  EXPECT_LT((model->bn1->running_var - variance).abs().max().item<double>(), 1e-14);
}

TEST(ReestimateBatchNorm, LeavesTheStatisticsWithoutABatchOrWhenTheModelThrows) {
  TinyNet model;
  model->forward(random_batch().x);
  const at::Tensor mean = model->bn2->running_mean.clone();
  EXPECT_NE(refusal([&] { reestimate_batch_norm(*model, [] { return false; }); }).find("no batch"), std::string::npos);
  int calls = 0;
  const auto failing = [&] {
    model->forward(random_batch().x);
    TORCH_CHECK(++calls < 2, "second batch");
    return true;
  };
  EXPECT_NE(refusal([&] { reestimate_batch_norm(*model, failing); }).find("second batch"), std::string::npos);
  EXPECT_TRUE(torch::equal(model->bn2->running_mean, mean));
  EXPECT_EQ(model->bn2->num_batches_tracked.item<int64_t>(), 1);
  EXPECT_EQ(model->bn2->options.momentum(), 0.1);
  EXPECT_TRUE(model->bn2->is_training());
}

}  // namespace
}  // namespace cctorch
