// Masks and fake-quantization on the weights of a C++ model, by a plan.
#include <gtest/gtest.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/sgd.h>
#include <torch/types.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "tests/cpp/refusal.h"
#include "tiny_net.h"

namespace cctorch {
namespace {

LayerPlan conv2() { return LayerPlan::unchanged("conv2", LayerKind::conv2d, 8, 8); }
LayerPlan linear() { return LayerPlan::unchanged("linear", LayerKind::linear, 12, 4); }

CompressionPlan plan_of(std::vector<LayerPlan> layers) { return {.method = "by hand", .layers = std::move(layers)}; }

at::Tensor copy_of(const at::Tensor& tensor) { return tensor.detach().clone(); }

// s clamp(round(w / s)), row by row, s by LSQ's rule from the values that count.
at::Tensor by_hand(const at::Tensor& weight, const at::Tensor& kept, int64_t bits) {
  at::Tensor result = torch::zeros_like(weight);
  const double qmax = std::pow(2.0, bits - 1) - 1;
  for (int64_t row = 0; row < weight.size(0); ++row) {
    const at::Tensor counted = weight[row].masked_select(kept[row]);
    const double scale = 2 * counted.abs().mean().item<double>() / std::sqrt(qmax);
    const at::Tensor value = (weight[row] / scale).round().clamp(-qmax - 1, qmax) * scale;
    result[row].copy_(torch::where(kept[row], value, torch::zeros_like(value)));
  }
  return result;
}

TEST(Prepare, TheMaskComesBeforeTheQuantization) {
  TinyNet model;
  LayerPlan planned = conv2();
  planned.mask = MaskPlan{.kind = MaskPlan::Kind::nm, .n = 2, .m = 4};
  planned.bits = 3;
  const at::Tensor dense = copy_of(model->conv2->weight);
  // The two largest of every four input channels.
  const at::Tensor groups = dense.abs().view({8, 2, 4, 3, 3});
  const at::Tensor kept = (groups >= std::get<0>(groups.sort(2, true)).narrow(2, 1, 1)).view(dense.sizes());
  prepare(*model, plan_of({planned}));
  const at::Tensor x = torch::randn({2, 8, 5, 5}, torch::kDouble);
  const at::Tensor wanted = at::conv2d(x, by_hand(dense, kept, 3), {}, 1, 1);
  EXPECT_TRUE(torch::allclose(model->conv2(x), wanted, 1e-10, 1e-12));
  EXPECT_TRUE(torch::equal(model->conv2->weight, dense));
}

TEST(Prepare, MagnitudeMasksOfOneSparsityAreOneSelection) {
  TinyNet model;
  LayerPlan first = conv2(), second = linear();
  first.mask = second.mask = MaskPlan{.sparsity = 0.75};
  {
    const torch::NoGradGuard no_grad;
    model->linear->weight.mul_(100);
  }
  prepare(*model, plan_of({first, second}));
  convert(*model);
  const int64_t values = 8 * 8 * 9 + 4 * 12;
  EXPECT_EQ((model->linear->weight != 0).sum().item<int64_t>(), 4 * 12);
  EXPECT_EQ((model->conv2->weight != 0).sum().item<int64_t>(), values / 4 - 4 * 12);
}

TEST(Prepare, ChannelMasksKeepTheLargestRows) {
  TinyNet model;
  LayerPlan planned = conv2();
  planned.mask = MaskPlan{.kind = MaskPlan::Kind::channel, .sparsity = 0.5};
  const at::Tensor norms = model->conv2->weight.detach().flatten(1).norm(2, 1);
  prepare(*model, plan_of({planned}));
  convert(*model);
  const at::Tensor left = model->conv2->weight.detach().flatten(1).norm(2, 1) > 0;
  EXPECT_TRUE(torch::equal(left, norms >= std::get<0>(norms.sort(0, true))[3]));
}

TEST(Prepare, WeightsAndScalesLearn) {
  TinyNet model;
  LayerPlan planned = conv2();
  planned.bits = 4;
  const at::Tensor before = model->conv2->weight;
  prepare(*model, plan_of({planned}), "mse");
  EXPECT_TRUE(model->conv2->weight.is_same(before));
  const at::Tensor scales = model->named_parameters()["conv2.weight_quant.log_scale"];
  const at::Tensor weights_were = copy_of(before), scales_were = copy_of(scales);
  torch::optim::SGD optimizer(model->parameters(), 0.1);
  const Batch batch = random_batch();
  model->loss(batch.x, batch.labels).backward();
  optimizer.step();
  EXPECT_GT((scales - scales_were).abs().min().item<double>(), 0);
  EXPECT_FALSE(torch::equal(before, weights_were));
}

TEST(Prepare, TheLargestValueIsWithinTheGridWhateverItsLastBit) {
  TinyNet model;
  LayerPlan planned = conv2();
  planned.bits = 4;
  prepare(*model, plan_of({planned}), "minmax");
  const auto& constraint = model->conv2->constraints().front();
  constraint(model->conv2->weight).sum().backward();
  // Straight-through: a value that is clipped has no gradient.
  EXPECT_TRUE((model->conv2->weight.grad() == 1).all().item<bool>());
}

TEST(Prepare, ConvertLeavesWhatWasComputed) {
  TinyNet model;
  LayerPlan factored = LayerPlan::unchanged("conv3", LayerKind::conv2d, 8, 12), planned = linear();
  factored.kept_in = factored.gather = {1, 2, 5};
  factored.rank = 5;
  factored.bits = planned.bits = 3;
  const CompressionPlan plan = plan_of({factored, planned});
  cctorch::apply(*model, plan);  // masks and bits are left for prepare
  EXPECT_FALSE(model->linear->plan());
  const at::Tensor first = model->conv3->first;
  prepare(*model, plan);
  const Batch batch = random_batch();
  model->forward(batch.x);
  model->eval();
  const at::Tensor y = model->forward(batch.x).detach();
  convert(*model);
  EXPECT_TRUE(torch::equal(model->forward(batch.x), y));
  EXPECT_TRUE(model->conv3->first.is_same(first));
  EXPECT_TRUE(model->conv3->children().empty());
  for (const at::Tensor& weight : {model->conv3->first, model->conv3->second, model->linear->weight}) {
    for (int64_t row = 0; row < weight.size(0); ++row)
      EXPECT_LE(std::get<0>(at::_unique(weight[row].detach())).numel(), 8);
  }
  convert(*model);
  EXPECT_TRUE(torch::equal(model->forward(batch.x), y));
  prepare(*model, plan);  // again
}

TEST(Prepare, AClonedLayerHasConstraintsOfItsOwn) {
  TinyNet model;
  LayerPlan planned = conv2();
  planned.mask = MaskPlan{.sparsity = 0.5};
  planned.bits = 4;
  prepare(*model, plan_of({planned}));
  const auto clone = std::dynamic_pointer_cast<nn::Conv2dImpl>(model->conv2->clone());
  const at::Tensor x = torch::randn({2, 8, 5, 5}, torch::kDouble);
  const at::Tensor y = model->conv2(x).detach();
  EXPECT_TRUE(torch::equal(clone->forward(x), y));
  const torch::NoGradGuard no_grad;
  for (at::Tensor& parameter : clone->parameters()) parameter.add_(1);
  EXPECT_TRUE(torch::equal(model->conv2(x), y));
  EXPECT_FALSE(torch::equal(clone->forward(x), y));
}

TEST(Prepare, TheQuantizedStateIsThatOfTheConvertedModel) {
  for (const auto type : {torch::kDouble, torch::kFloat}) {
    TinyNet model;
    LayerPlan gathering = LayerPlan::unchanged("conv3", LayerKind::conv2d, 8, 12), masked = conv2(), both = linear();
    gathering.kept_in = gathering.gather = {1, 2, 5};
    gathering.bits = 4;
    masked.mask = both.mask = MaskPlan{.sparsity = 0.5};
    both.bits = 2;
    const CompressionPlan plan = plan_of({gathering, masked, both});
    cctorch::apply(*model, plan);
    model->to(type);
    prepare(*model, plan);
    const auto before = state_dict(*model);
    const auto state = quantized_state_dict(*model);
    EXPECT_EQ(state_dict(*model).size(), before.size());
    EXPECT_EQ(state.at("linear.weight.codes").numel(), 12);
    EXPECT_EQ(state.at("conv3.layer.weight.codes").numel(), 12 * 3 * 9 / 2);
    EXPECT_FALSE(state.contains("linear.weight"));
    convert(*model);
    const auto wanted = state_dict(*model), found = decode_weights(state);
    ASSERT_EQ(found.size(), wanted.size());
    for (const auto& [name, value] : wanted) EXPECT_TRUE(torch::equal(found.at(name), value)) << name;
    TinyNet fresh;
    cctorch::apply(*fresh, plan);
    fresh->to(type);
    load_state_dict(*fresh, from_safetensors(to_safetensors({state, {}})).tensors);
    EXPECT_TRUE(torch::equal(fresh->linear->weight, model->linear->weight));
  }
}

LayerSpec spec_of(const LayerPlan& layer) {
  return {.name = layer.name, .kind = layer.kind, .in_channels = layer.in_channels, .out_channels = layer.out_channels};
}

TEST(SetBits, OfWhatThePlanNamesAndOfWhatItLeaves) {
  LayerPlan narrow = conv2();
  narrow.kept_in = narrow.gather = {1, 5};
  LayerPlan removed = LayerPlan::unchanged("removed", LayerKind::conv2d, 4, 4);
  removed.kept_in.clear();
  CompressionPlan plan = plan_of({narrow, removed});
  const std::vector<LayerSpec> model{spec_of(removed), spec_of(linear()), spec_of(conv2())};
  set_bits(model, plan, {{"conv2", 4}, {"linear", 8}, {"removed", 4}});
  narrow.bits = 4;
  LayerPlan added = linear();
  added.bits = 8;
  EXPECT_EQ(plan.layers, (std::vector<LayerPlan>{narrow, removed, added}));
}

TEST(SetBits, WhatCannotBeIsRefusedAndChangesNothing) {
  CompressionPlan plan = plan_of({conv2()});
  const std::vector<LayerSpec> model{spec_of(conv2()), spec_of(linear())};
  EXPECT_NE(
      refusal([&] { set_bits(model, plan, {{"linear", 4}, {"linaer", 4}}); }).find("the model has no layer 'linaer'"),
      std::string::npos);
  EXPECT_NE(refusal([&] { set_bits(model, plan, {{"conv2", 1}}); }).find("layer 'conv2': bits = 1, expected 2 to 16"),
            std::string::npos);
  EXPECT_EQ(plan.layers, std::vector<LayerPlan>{conv2()});
}

TEST(SetBits, OfLayersWithoutAWeightToQuantizeIsRefused) {
  for (const LayerKind kind : {LayerKind::batch_norm2d, LayerKind::lstm}) {
    CompressionPlan plan;
    const std::vector<LayerSpec> model{{.name = "layer", .kind = kind, .in_channels = 4, .out_channels = 4}};
    EXPECT_NE(refusal([&] { set_bits(model, plan, {{"layer", 4}}); }).find("layer 'layer' is of kind"),
              std::string::npos);
    EXPECT_TRUE(plan.layers.empty());
  }
}

TEST(Prepare, WhatCannotBeIsRefusedAndChangesNothing) {
  TinyNet model;
  const auto refused = [&](const LayerPlan& wrong, const std::string& message, const std::string& init = "lsq") {
    LayerPlan right = linear();
    right.bits = 4;
    const std::string found = refusal([&] { prepare(*model, plan_of({right, wrong}), init); });
    EXPECT_NE(found.find(message), std::string::npos) << found;
    EXPECT_TRUE(model->linear->constraints().empty());
    EXPECT_EQ(model->linear->children().size(), 0U);
  };
  const auto with_bits = [](LayerPlan layer, int64_t bits = 4) {
    layer.bits = bits;
    return layer;
  };
  refused(with_bits(LayerPlan::unchanged("conv9", LayerKind::conv2d, 8, 8)),
          "has no layer 'conv9' to mask or quantize");
  refused(with_bits(LayerPlan::unchanged("conv2", LayerKind::conv2d, 8, 16)), "the plan expects a conv2d of 8 -> 16");
  refused(with_bits(LayerPlan::unchanged("bn1", LayerKind::batch_norm2d, 8, 8)), "layer 'bn1' has no weight");
  refused(with_bits(conv2()), "init = best, expected lsq, minmax or mse", "best");
  LayerPlan wrong = conv2();
  wrong.mask = MaskPlan{.kind = MaskPlan::Kind::nm, .n = 2, .m = 3};
  refused(wrong, "'conv2' has 8 input channels, expected a multiple of m = 3");
  model->register_module("head", torch::nn::Linear(12, 4));
  refused(with_bits(LayerPlan::unchanged("head", LayerKind::linear, 12, 4)),
          "build the model with cctorch::nn::Conv2d");
  model->register_module("alias", model->linear);
  refused(with_bits(LayerPlan::unchanged("alias", LayerKind::linear, 12, 4)), "are one module under two names");
  {
    const torch::NoGradGuard no_grad;
    model->conv2->weight[0][0][0][0] = std::numeric_limits<double>::quiet_NaN();
  }
  refused(with_bits(conv2()), "'conv2' has a weight with NaN or infinity");
  LayerPlan prepared = LayerPlan::unchanged("conv1", LayerKind::conv2d, 3, 8);
  prepared.mask = MaskPlan{.sparsity = 0.5};
  prepare(*model, plan_of({prepared}));
  refused(prepared, "layer 'conv1' is prepared already");
  prepared.mask.reset();
  prepared.kept_out = {0, 1};
  EXPECT_NE(refusal([&] { cctorch::apply(*model, plan_of({prepared})); }).find("call convert() first"),
            std::string::npos);
}

}  // namespace
}  // namespace cctorch
