#include <cctorch/cctorch.h>
#include <gtest/gtest.h>
#include <torch/serialize.h>
#include <torch/types.h>

#include <cmath>
#include <limits>
#include <sstream>

#include "tests/cpp/refusal.h"

namespace cctorch::nn {
namespace {

at::Tensor index(const std::vector<int64_t>& positions) { return torch::tensor(positions, torch::kLong); }

at::Tensor doubles(at::IntArrayRef shape) { return torch::randn(shape, torch::kDouble); }

double difference(const at::Tensor& a, const at::Tensor& b) {
  EXPECT_EQ(a.sizes(), b.sizes());
  return (a - b).abs().max().item<double>();
}

// The weight with every input channel outside `kept` set to zero.
at::Tensor masked(const at::Tensor& weight, const std::vector<int64_t>& kept) {
  at::Tensor result = torch::zeros_like(weight);
  return result.index_copy(1, index(kept), weight.index_select(1, index(kept)));
}

// The nearest weight of rank `rank` (Frobenius norm) among those that read only `kept`.
at::Tensor projected(const at::Tensor& weight, const std::vector<int64_t>& kept, int64_t rank) {
  const auto [u, s, v] = torch::linalg_svd(masked(weight, kept).flatten(1), /*full_matrices=*/false);
  const auto columns = torch::indexing::Slice(0, rank);
  const at::Tensor low =
      u.index({torch::indexing::Slice(), columns}).matmul(s.index({columns}).diag()).matmul(v.index({columns}));
  return low.view_as(weight);
}

LayerPlan plan_of(LayerKind kind, int64_t in, int64_t out) { return LayerPlan::unchanged("layer", kind, in, out); }

template <typename Layer>
std::string refusal(Layer& layer, const LayerPlan& plan) {
  try {
    layer->compress(plan);
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

struct Shape {
  int64_t kernel, stride, padding, dilation;
  bool bias;
};

class ConvolutionTest : public testing::TestWithParam<Shape> {
 protected:
  Conv2d make() const {
    const Shape shape = GetParam();
    Conv2d layer(torch::nn::Conv2dOptions(6, 8, shape.kernel)
                     .stride(shape.stride)
                     .padding(shape.padding)
                     .dilation(shape.dilation)
                     .bias(shape.bias));
    layer->to(torch::kDouble);
    return layer;
  }

  static at::Tensor reference(const Conv2d& layer, const at::Tensor& x, const at::Tensor& weight) {
    const Shape shape = GetParam();
    return at::conv2d(x, weight, layer->bias, shape.stride, shape.padding, shape.dilation);
  }
};

TEST_P(ConvolutionTest, NarrowedEqualsTheMaskedDenseLayer) {
  Conv2d layer = make();
  const at::Tensor x = doubles({2, 6, 9, 9});
  LayerPlan plan = plan_of(LayerKind::conv2d, 6, 8);
  plan.kept_in = {0, 2, 5};
  plan.kept_out = {1, 3, 4, 7};
  const at::Tensor expected =
      reference(layer, x, masked(layer->weight, plan.kept_in)).index_select(1, index(plan.kept_out));
  layer->compress(plan);
  EXPECT_LT(difference(layer(x.index_select(1, index(plan.kept_in))), expected), 1e-12);
  EXPECT_EQ(layer->named_parameters()["weight"].sizes().slice(0, 2), at::IntArrayRef({4, 3}));
}

TEST_P(ConvolutionTest, FactoredEqualsTheProjectedDenseLayer) {
  Conv2d layer = make();
  const at::Tensor x = doubles({2, 6, 9, 9});
  LayerPlan plan = plan_of(LayerKind::conv2d, 6, 8);
  plan.kept_in = {1, 2, 3, 5};
  plan.kept_out = {0, 2, 6};
  plan.rank = 3;
  const at::Tensor weight = projected(layer->weight, plan.kept_in, 3);
  const at::Tensor expected = reference(layer, x, weight).index_select(1, index(plan.kept_out));
  layer->compress(plan);
  EXPECT_LT(difference(layer(x.index_select(1, index(plan.kept_in))), expected), 1e-10);
  EXPECT_FALSE(layer->named_parameters().contains("weight"));
  EXPECT_EQ(layer->named_parameters()["first"].sizes().slice(0, 2), at::IntArrayRef({3, 4}));
  EXPECT_EQ(layer->named_parameters()["second"].sizes(), at::IntArrayRef({3, 3, 1, 1}));
  EXPECT_EQ(layer->named_parameters().contains("bias"), GetParam().bias);
}

TEST_P(ConvolutionTest, GathersWhereMoreChannelsArriveThanItReads) {
  Conv2d layer = make();
  const at::Tensor x = doubles({2, 6, 9, 9});
  LayerPlan plan = plan_of(LayerKind::conv2d, 6, 8);
  plan.kept_in = {0, 2, 5};
  plan.gather = {0, 1, 3};  // 0, 2, 3 and 5 arrive
  const at::Tensor expected = reference(layer, x, masked(layer->weight, plan.kept_in));
  layer->compress(plan);
  EXPECT_LT(difference(layer(x.index_select(1, index({0, 2, 3, 5}))), expected), 1e-12);
}

INSTANTIATE_TEST_SUITE_P(Shapes, ConvolutionTest,
                         testing::Values(Shape{3, 1, 1, 1, true}, Shape{3, 2, 1, 1, false}, Shape{1, 1, 0, 1, true},
                                         Shape{3, 1, 2, 2, true}));

TEST(Conv2d, DepthwiseKeepsItsGroups) {
  Conv2d layer(torch::nn::Conv2dOptions(6, 6, 3).groups(6).padding(1));
  layer->to(torch::kDouble);
  const at::Tensor x = doubles({2, 6, 5, 5});
  LayerPlan plan = plan_of(LayerKind::depthwise_conv2d, 6, 6);
  plan.kept_in = plan.kept_out = {1, 4};
  const at::Tensor expected = layer(x).index_select(1, index(plan.kept_out));
  layer->compress(plan);
  EXPECT_LT(difference(layer(x.index_select(1, index(plan.kept_in))), expected), 1e-12);
}

TEST(Conv2d, KeepsTypeFormatAndFrozenState) {
  Conv2d layer(torch::nn::Conv2dOptions(6, 8, 3));
  layer->weight.set_requires_grad(false);
  layer->weight.set_data(layer->weight.contiguous(at::MemoryFormat::ChannelsLast));
  LayerPlan plan = plan_of(LayerKind::conv2d, 6, 8);
  plan.rank = 4;
  layer->eval();
  layer->compress(plan);
  EXPECT_EQ(layer->first.scalar_type(), torch::kFloat);
  EXPECT_TRUE(layer->first.is_contiguous(at::MemoryFormat::ChannelsLast));
  EXPECT_FALSE(layer->first.requires_grad());
  EXPECT_FALSE(layer->second.requires_grad());
  EXPECT_TRUE(layer->bias.requires_grad());
  EXPECT_TRUE(layer->bias.is_leaf());
  EXPECT_FALSE(layer->is_training());
}

TEST(Conv2d, CloneOfACompressedLayerIsIndependentAndEqual) {
  Conv2d layer(torch::nn::Conv2dOptions(6, 8, 3));
  LayerPlan plan = plan_of(LayerKind::conv2d, 6, 8);
  plan.kept_in = {0, 2, 5};
  plan.gather = {0, 1, 3};
  plan.rank = 2;
  layer->compress(plan);
  const at::Tensor x = torch::randn({1, 4, 5, 5});
  const auto copy = std::dynamic_pointer_cast<Conv2dImpl>(layer->clone());
  EXPECT_TRUE(torch::equal(copy->forward(x), layer(x)));
  EXPECT_NE(copy->first.data_ptr(), layer->first.data_ptr());
}

TEST(Conv2d, RefusesWhatItCannotCarryOutAndStaysAsItWas) {
  Conv2d layer(torch::nn::Conv2dOptions(6, 8, 3));
  const at::Tensor before = layer->weight;
  LayerPlan rank = plan_of(LayerKind::conv2d, 6, 8);
  rank.kept_in = {3};
  rank.rank = 8;
  EXPECT_EQ(refusal(layer, rank), "");  // 8 x 9 has rank 8

  Conv2d pointwise(torch::nn::Conv2dOptions(6, 8, 1));
  EXPECT_NE(refusal(pointwise, rank).find("rank = 8, expected at most 1"), std::string::npos);
  EXPECT_TRUE(pointwise->weight.defined());

  Conv2d grouped(torch::nn::Conv2dOptions(6, 8, 3).groups(2));
  LayerPlan narrowed = plan_of(LayerKind::conv2d, 6, 8);
  narrowed.kept_out = {0, 1};
  EXPECT_NE(refusal(grouped, narrowed).find("groups = 2"), std::string::npos);
  EXPECT_EQ(refusal(grouped, plan_of(LayerKind::conv2d, 6, 8)), "");

  EXPECT_NE(refusal(layer, narrowed).find("compressed already"), std::string::npos);
  EXPECT_THROW(Conv2d(torch::nn::Conv2dOptions(6, 8, 3).padding(torch::kSame)), c10::Error);
  EXPECT_THROW(Conv2d(0, 8, 3), c10::ValueError);
}

TEST(Linear, NarrowedAndFactored) {
  const at::Tensor x = doubles({2, 3, 7});
  for (const bool factored : {false, true}) {
    Linear layer(7, 5);
    layer->to(torch::kDouble);
    LayerPlan plan = plan_of(LayerKind::linear, 7, 5);
    plan.kept_in = {0, 3, 4, 6};
    plan.kept_out = {1, 2, 4};
    if (factored) plan.rank = 2;
    const at::Tensor weight =
        factored ? projected(layer->weight, plan.kept_in, 2) : masked(layer->weight, plan.kept_in);
    const at::Tensor expected = at::linear(x, weight, layer->bias).index_select(-1, index(plan.kept_out));
    layer->compress(plan);
    EXPECT_LT(difference(layer(x.index_select(-1, index(plan.kept_in))), expected), 1e-10);
  }
}

TEST(BatchNorm2d, KeepsTheStatisticsOfItsChannels) {
  BatchNorm2d layer(5);
  layer->to(torch::kDouble);
  layer(doubles({4, 5, 3, 3}) * 2 + 1);
  {
    torch::NoGradGuard no_grad;
    layer->weight.normal_();
    layer->bias.normal_();
  }
  const auto copy = std::dynamic_pointer_cast<BatchNorm2dImpl>(layer->clone());
  LayerPlan plan = plan_of(LayerKind::batch_norm2d, 5, 5);
  plan.kept_in = plan.kept_out = {0, 3};
  layer->compress(plan);
  const at::Tensor x = doubles({4, 5, 3, 3});
  for (const bool training : {true, false}) {
    layer->train(training);
    copy->train(training);
    const at::Tensor expected = copy->forward(x).index_select(1, index({0, 3}));
    EXPECT_LT(difference(layer(x.index_select(1, index({0, 3}))), expected), 1e-12);
  }
  EXPECT_LT(difference(layer->running_var, copy->running_var.index_select(0, index({0, 3}))), 1e-12);
}

TEST(FakeQuant, StartsFromTheDataAndKeepsALoadedScale) {
  FakeQuant quant(FakeQuantOptions(4).axis(0).channels(3));
  const at::Tensor weight = torch::randn({3, 2, 5, 5});
  const at::Tensor y = quant(weight);
  const at::Tensor scale = 2 * weight.abs().mean(at::IntArrayRef{1, 2, 3}) / std::sqrt(7.0);
  EXPECT_LT(difference(quant->log_scale.exp(), scale), 1e-6);
  const at::Tensor levels = y / quant->log_scale.exp().view({3, 1, 1, 1});
  EXPECT_LT(difference(levels, levels.round().clamp(-8, 7)), 1e-4);

  std::stringstream stream;
  torch::save(quant, stream);
  FakeQuant loaded(FakeQuantOptions(4).axis(0).channels(3));
  torch::load(loaded, stream);
  EXPECT_TRUE(torch::equal(loaded(weight * 100), quant(weight * 100)));
  EXPECT_THROW(FakeQuant(1), c10::Error);
}

TEST(FakeQuant, ItsScaleIsThatOfTheValuesItGives) {
  for (const auto type : {torch::kFloat, torch::kDouble, torch::kHalf}) {
    FakeQuant quant(FakeQuantOptions(3).axis(0).channels(64));
    quant->to(type == torch::kHalf ? torch::kFloat : type);
    const at::Tensor weight = (torch::randn({64, 40}) * torch::logspace(-3, 3, 64).view({64, 1})).to(type);
    const at::Tensor y = quant(weight).detach(), scale = quant->scale();
    const at::Tensor codes = (y.to(torch::kDouble) / scale.to(torch::kDouble).view({64, 1})).round();
    EXPECT_EQ(codes.max().item<double>(), 3);
    EXPECT_TRUE(torch::equal((codes.to(scale.scalar_type()) * scale.view({64, 1})).to(type), y)) << type;
    Safetensors::Tensors state = {{"w", y}};
    encode_weight(state, "w", scale, 3);
    EXPECT_TRUE(torch::equal(decode_weights(state).at("w").to(type), y)) << type;
  }
  // Beyond what exp can give.
  FakeQuant extreme(FakeQuantOptions(4).axis(0).channels(2));
  extreme(torch::ones({2, 3}));
  torch::NoGradGuard no_grad;
  extreme->log_scale.copy_(torch::tensor({-200.0F, 200.0F}));
  const at::Tensor wanted = torch::tensor({std::numeric_limits<float>::min(), std::numeric_limits<float>::max()});
  EXPECT_TRUE(torch::equal(extreme->scale(), wanted));
  FakeQuant whole(FakeQuantOptions(4)), grouped(FakeQuantOptions(4).axis(0).channels(6).groups(2));
  whole(torch::randn({3}));
  grouped(torch::randn({6, 4}));
  EXPECT_LT(difference(whole->scale(), whole->log_scale.exp()), 1e-6);
  EXPECT_LT(difference(grouped->scale(), grouped->log_scale.exp()), 1e-6);
}

TEST(FakeQuant, CopiedScalesAreKeptAndOnesThatNeverStartedStart) {
  FakeQuant quant(FakeQuantOptions(4)), average(FakeQuantOptions(4)), loaded(FakeQuantOptions(4));
  const at::Tensor x = doubles({5, 7}).to(torch::kFloat);
  std::stringstream stream;
  torch::save(quant, stream);
  torch::load(loaded, stream);
  const at::Tensor y = quant(x);
  {
    const torch::NoGradGuard no_grad;
    average->log_scale.copy_(quant->log_scale);
  }
  EXPECT_TRUE(torch::equal(average(x * 100), quant(x * 100)));
  EXPECT_TRUE(torch::equal(loaded(x), y));
}

TEST(FakeQuant, ValuesThatAreNotFiniteSetNoScale) {
  for (const bool per_channel : {false, true}) {
    auto options = FakeQuantOptions(4);
    if (per_channel) options = options.axis(1).channels(7);
    FakeQuant quant(options), expected(options);
    const at::Tensor x = doubles({5, 7}).to(torch::kFloat);
    at::Tensor overflowed = torch::cat({x, x});
    overflowed.narrow(0, 5, 5).fill_(std::numeric_limits<float>::infinity());
    overflowed[6] = std::numeric_limits<float>::quiet_NaN();
    quant(overflowed);
    expected(x);
    EXPECT_LT(difference(quant->log_scale, expected->log_scale), 1e-6);
  }
}

TEST(FakeQuant, AModuleInHalfPrecisionQuantizesWithScalesOfFloat32) {
  // 200,000 magnitudes of 2 add up to more than float16 holds.
  const at::Tensor x = torch::rand({4, 50000}) * 4;
  for (const auto type : {at::kHalf, at::kBFloat16}) {
    for (const auto& options : {FakeQuantOptions(4), FakeQuantOptions(4).offset(true).init("minmax"),
                                FakeQuantOptions(4).axis(0).channels(4).groups(2)}) {
      FakeQuant quant(options), reference(options);
      quant->to(type);
      const at::Tensor y = quant(x.to(type));
      reference(x.to(type).to(at::kFloat));
      EXPECT_TRUE(torch::equal(quant->log_scale, reference->log_scale.to(type)));
      const torch::NoGradGuard no_grad;
      reference->log_scale.copy_(quant->log_scale);
      if (options.offset()) reference->offset.copy_(quant->offset);
      EXPECT_EQ(y.scalar_type(), type);
      EXPECT_TRUE(torch::equal(y, reference(x.to(type).to(at::kFloat)).to(type)));
    }
  }
}

TEST(FakeQuant, AnEmptyInputStartsNoScale) {
  FakeQuant quant(FakeQuantOptions(4)), expected(FakeQuantOptions(4));
  const at::Tensor x = doubles({5, 7}).to(torch::kFloat);
  EXPECT_EQ(quant->forward(torch::empty({0, 7})).size(0), 0);
  EXPECT_TRUE(torch::equal(quant->forward(x), expected->forward(x)));
}

TEST(FakeQuant, AChannelOfZerosHasAFiniteScale) {
  FakeQuant quant(FakeQuantOptions(8).axis(0).channels(2));
  const at::Tensor weight = torch::stack({torch::zeros({4}), torch::ones({4})});
  EXPECT_TRUE(torch::equal(quant(weight)[0], weight[0]));
  EXPECT_TRUE(quant->log_scale.isfinite().all().item<bool>());
}

TEST(FakeQuant, OffsetsGroupsAndRanges) {
  const at::Tensor weight = torch::rand({3, 2, 4}) + 1;
  FakeQuant quant(FakeQuantOptions(8).axis(0).channels(3).groups(2).offset(true).init("minmax"));
  EXPECT_LT(difference(quant(weight), weight), 1.0 / 255);
  EXPECT_EQ(quant->log_scale.sizes(), at::IntArrayRef({3, 2}));
  const at::Tensor groups = weight.view({3, 2, 4});
  EXPECT_LT(difference(quant->log_scale.exp(), (groups.amax(-1) - groups.amin(-1)) / 255), 1e-6);
  // Straight-through: a value that is clipped has no gradient.
  const at::Tensor leaf = weight.clone().requires_grad_();
  quant(leaf).sum().backward();
  EXPECT_TRUE((leaf.grad() == 1).all().item<bool>());
  EXPECT_TRUE(quant->offset.grad().defined());
  for (const char* init : {"minmax", "mse"}) {
    FakeQuant symmetric(FakeQuantOptions(8).init(init));
    EXPECT_LT(difference(symmetric(weight), weight), 2.0 / 127);
  }
  EXPECT_THROW(FakeQuant(FakeQuantOptions(8).groups(2)), c10::Error);
  EXPECT_THROW(FakeQuant(FakeQuantOptions(8).init("best")), c10::Error);
  EXPECT_THROW(quant(torch::rand({3, 5})), c10::Error);
}

TEST(Modules, GateAndMask) {
  ChannelGate gate(3);
  const at::Tensor x = torch::randn({2, 3, 4, 4});
  gate(x).pow(2).sum().backward();
  EXPECT_LT(difference(gate->gate.grad(), 2 * x.pow(2).sum(at::IntArrayRef{0, 2, 3})), 1e-4);

  const at::Tensor weight = torch::randn({4, 8}).set_requires_grad(true);
  Mask mask(nm_masks({weight}, 2, 4)[0]);
  mask->to(torch::kDouble);
  const at::Tensor kept = mask(weight);
  EXPECT_EQ(kept.count_nonzero().item<int64_t>(), 16);
  kept.sum().backward();
  EXPECT_TRUE(torch::equal(weight.grad(), torch::ones_like(weight)));
}

TEST(Modules, SoftThresholdsAndHardConcreteGates) {
  SoftThreshold soft(0.25, 0, 2);
  const at::Tensor weight = torch::tensor({{0.5, -1.0}, {0.125, 0.75}}, torch::kDouble).set_requires_grad(true);
  const at::Tensor pruned = soft(weight);
  EXPECT_LT(difference(pruned, torch::tensor({{0.25, -0.75}, {0.0, 0.5}}, torch::kDouble)), 1e-6);
  pruned.sum().backward();
  EXPECT_TRUE(weight.grad().equal(torch::tensor({{1.0, 1.0}, {0.0, 1.0}}, torch::kDouble)));
  EXPECT_LT(difference(soft->s.grad(), torch::tensor({0.0, -0.25 * 0.75})), 1e-6);
  EXPECT_THROW(SoftThreshold(0.0), c10::Error);
  EXPECT_THROW(SoftThreshold(0.5, std::nullopt, 2), c10::Error);

  HardConcreteGate gate(1000, 0.75);
  EXPECT_NEAR(gate->expected_l0().item<double>(), 750, 1e-2);
  const at::Tensor x = torch::ones({1, 1000});
  EXPECT_FALSE(torch::equal(gate(x), gate(x)));
  // Five standard deviations of 1000 draws
  EXPECT_NEAR(gate(x).count_nonzero().item<double>(), 750, 5 * std::sqrt(1000 * 0.75 * 0.25));
  gate->eval();
  EXPECT_TRUE(torch::equal(gate(x), gate(x)));
  EXPECT_THROW(HardConcreteGate(3, 1.0), c10::Error);
}

TEST(Modules, LowRankLayoutsAtFullRankAreTheDenseLayer) {
  const auto options = torch::nn::Conv2dOptions(4, 6, {3, 5}).stride({2, 1}).padding(1);
  const at::Tensor weight = doubles({6, 4, 3, 5}), x = doubles({2, 4, 9, 9});
  for (auto layer : {LowRankConv2d(options, 6), LowRankConv2d(options, 18, LowRankLayout::spatial),
                     LowRankConv2d(options, std::pair<int64_t, int64_t>(6, 4))}) {
    layer->to(torch::kDouble);
    layer->factorize(weight);
    EXPECT_LT(difference(layer->forward(x), at::conv2d(x, weight, layer->bias, {2, 1}, {1, 1})), 1e-10);
    EXPECT_TRUE(layer->first.requires_grad());
    EXPECT_THROW(layer->factorize(weight.flatten(1)), c10::Error);
  }
  LowRankLinear linear(6, 5, 5);
  linear->to(torch::kDouble);
  const at::Tensor matrix = doubles({5, 6}), rows = doubles({3, 6});
  linear->factorize(matrix);
  EXPECT_LT(difference(linear(rows), at::linear(rows, matrix, linear->bias)), 1e-11);
  EXPECT_THROW(LowRankConv2d(options, std::pair<int64_t, int64_t>(7, 4)), c10::Error);
  EXPECT_THROW(LowRankConv2d(options, 19, LowRankLayout::spatial), c10::Error);
}

TEST(Modules, FactorsAreOfTheWeightThatThePlanSays) {
  LayerPlan plan = LayerPlan::unchanged("a", LayerKind::conv2d, 4, 6);
  EXPECT_NE(cctorch::refusal([&] { factorize(doubles({6, 4, 3, 3}), plan); }).find("has no rank"), std::string::npos);
  plan.rank = 2;
  plan.layout = LowRankLayout::tucker;
  EXPECT_NE(cctorch::refusal([&] { factorize(doubles({6, 4, 3, 3}), plan); }).find("or no rank_in"), std::string::npos);
  plan.rank_in = 2;
  EXPECT_EQ(factorize(doubles({6, 4, 3, 3}), plan).core.sizes(), at::IntArrayRef({2, 2, 3, 3}));
  for (const at::Tensor& other : {doubles({6, 4}), doubles({6, 5, 3, 3}), doubles({4, 4, 3, 3}), doubles({6, 4, 3})})
    EXPECT_NE(cctorch::refusal([&] { factorize(other, plan); }).find("expected that of layer 'a'"), std::string::npos);
}

TEST(Modules, LowRankEqualsTheProductOfItsFactors) {
  LowRankLinear linear(6, 5, 2);
  linear->to(torch::kDouble);
  const at::Tensor rows = doubles({7, 6});
  EXPECT_LT(difference(linear(rows), at::linear(rows, linear->second.matmul(linear->first), linear->bias)), 1e-12);

  LowRankConv2d convolution(torch::nn::Conv2dOptions(4, 6, 3).stride(2).padding(1), 3);
  convolution->to(torch::kDouble);
  const at::Tensor weight = convolution->second.flatten(1).matmul(convolution->first.flatten(1)).view({6, 4, 3, 3});
  const at::Tensor x = doubles({2, 4, 9, 9});
  EXPECT_LT(difference(convolution(x), at::conv2d(x, weight, convolution->bias, 2, 1)), 1e-12);
  EXPECT_THROW(LowRankLinear(6, 5, 6), c10::Error);
}

}  // namespace
}  // namespace cctorch::nn
