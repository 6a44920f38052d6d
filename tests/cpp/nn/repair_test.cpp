#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "tests/cpp/refusal.h"
#include "tiny_net.h"

namespace cctorch::repair {
namespace {

// How a block joins its shortcut.
enum class Sum { plain, in_place, reversed };

// A stem, a block with a shortcut, and a head; in float64. With `raw`, the convolution's output is used beside its
// norm.
struct BlockNetImpl : torch::nn::Module {
  explicit BlockNetImpl(Sum sum_ = Sum::plain, bool raw_ = false) : sum(sum_), raw(raw_) {
    const auto conv = [](int64_t in, int64_t out) {
      return nn::Conv2d(torch::nn::Conv2dOptions(in, out, 3).padding(1).bias(false));
    };
    stem = register_module("stem", conv(3, 8));
    norm0 = register_module("norm0", nn::BatchNorm2d(8));
    conv1 = register_module("conv1", conv(8, 6));
    norm1 = register_module("norm1", nn::BatchNorm2d(6));
    conv2 = register_module("conv2", conv(6, 8));
    norm2 = register_module("norm2", nn::BatchNorm2d(8));
    head = register_module("head", nn::Linear(8, 4));
    to(torch::kDouble);
  }

  at::Tensor block(const at::Tensor& shortcut) {
    const at::Tensor inner = norm1(conv1(shortcut)).relu();
    const at::Tensor own = conv2(inner);
    at::Tensor y = norm2(own);
    if (raw) y = y + own.mean({2, 3}, true);
    if (sum == Sum::in_place) return y += shortcut;
    return sum == Sum::plain ? y + shortcut : shortcut + y;
  }

  at::Tensor forward(const at::Tensor& x) {
    seen = norm0(stem(x)).relu();
    joined = block(seen);
    return head(joined.relu().mean({2, 3}));
  }

  Sum sum;
  bool raw;
  nn::Conv2d stem{nullptr}, conv1{nullptr}, conv2{nullptr};
  nn::BatchNorm2d norm0{nullptr}, norm1{nullptr}, norm2{nullptr};
  nn::Linear head{nullptr};
  at::Tensor seen, joined;
};
TORCH_MODULE(BlockNet);

template <typename Net>
void shake(Net& net, const at::Tensor& x) {
  const torch::NoGradGuard no_grad;
  for (auto& parameter : net->named_parameters()) {
    if (parameter.value().dim() == 1) parameter.value().add_(torch::rand_like(parameter.value()));
  }
  for (int i = 0; i < 20; ++i) net->forward(x);  // running statistics
  net->eval();
}

template <typename Net>
std::function<bool()> batches(Net& net, const at::Tensor& x, int64_t size) {
  auto next = std::make_shared<int64_t>(0);
  return [&net, x, size, next] {
    if (*next >= x.size(0)) return false;
    net->forward(x.slice(0, *next, *next + size));
    *next += size;
    return true;
  };
}

template <typename Net>
Repair repaired(Net& net, Net& dense, const CompressionPlan& plan, const at::Tensor& x,
                const ModelOptions& options = {.step = 1, .ridge = 1e-12}, int64_t size = 1000) {
  return repair(*net, [&] { net->forward(x); }, *dense, batches(dense, x, size), plan, x.size(0), options);
}

// The best affine function from the 3 x 3 windows of x to y: what it gives, as y.
at::Tensor best(const at::Tensor& x, const at::Tensor& y) {
  const at::Tensor columns = at::im2col(x, {3, 3}, {1, 1}, {1, 1}, {1, 1}).transpose(1, 2).flatten(0, 1);
  const at::Tensor read = at::cat({columns, at::ones({columns.size(0), 1}, x.options())}, 1);
  const at::Tensor wanted = y.permute({0, 2, 3, 1}).reshape({-1, y.size(1)});
  const at::Tensor found = read.mm(std::get<0>(at::linalg_lstsq(read, wanted, std::nullopt, "gelsd")));
  return found.view({y.size(0), y.size(2), y.size(3), y.size(1)}).permute({0, 3, 1, 2});
}

void expect_near(const at::Tensor& a, const at::Tensor& b, double tolerance = 1e-6) {
  ASSERT_EQ(a.sizes(), b.sizes());
  EXPECT_LT((a - b).abs().max().item<double>(), tolerance);
}

LayerPlan reading(const std::string& name, int64_t in, int64_t out, std::vector<int64_t> kept) {
  LayerPlan layer = LayerPlan::unchanged(name, LayerKind::conv2d, in, out);
  layer.kept_in = std::move(kept);
  return layer;
}

CompressionPlan block_plan() {
  ChannelGraph graph;
  auto x = graph.layer("stem", LayerKind::conv2d, graph.input(3), 8);
  x = graph.layer("norm0", LayerKind::batch_norm2d, x, 8);
  auto y = graph.layer("conv1", LayerKind::conv2d, x, 6);
  y = graph.layer("norm1", LayerKind::batch_norm2d, y, 6);
  y = graph.layer("conv2", LayerKind::conv2d, y, 8);
  y = graph.layer("norm2", LayerKind::batch_norm2d, y, 8);
  graph.pin(graph.layer("head", LayerKind::linear, graph.join(x, y), 4));
  CompressionPlan plan{.method = "test",
                       .target = 0.0,
                       .layers = {reading("conv1", 8, 6, {0, 2, 5, 6, 7}), reading("conv2", 6, 8, {1, 2, 4})}};
  graph.resolve(plan);
  return plan;
}

class BlockTest : public testing::TestWithParam<Sum> {
 protected:
  BlockTest() {
    torch::manual_seed(0);
    x = torch::randn({12, 3, 6, 6}, torch::kDouble);
    shake(dense, x);
    copy(net, dense);
    cctorch::apply(*net, block_plan());
    net->eval();
  }

  static void copy(BlockNet& to, BlockNet& from) {
    const torch::NoGradGuard no_grad;
    for (auto& value : to->named_parameters()) value.value().copy_(from->named_parameters()[value.key()]);
    for (auto& value : to->named_buffers()) value.value().copy_(from->named_buffers()[value.key()]);
  }

  at::Tensor x;
  BlockNet dense{GetParam()}, net{GetParam()};
};

TEST_P(BlockTest, BeginsWhereAShapeChangesNotWhereBitsDo) {
  CompressionPlan plan = block_plan();
  LayerPlan& stem = plan.layers.emplace_back(LayerPlan::unchanged("stem", LayerKind::conv2d, 3, 8));
  stem.bits = 4;
  EXPECT_EQ(repaired(net, dense, plan, x).layers.front().name, "conv1");
}

// conv1 by its own output behind the norm, conv2 by the sum that the dense model has: each on what now comes in.
TEST_P(BlockTest, IsTheLeastSquaresSolution) {
  const torch::NoGradGuard no_grad;
  const double before = (net->forward(x) - dense->forward(x)).square().mean().item<double>();
  const Repair result = repaired(net, dense, block_plan(), x);
  const double after = (net->forward(x) - dense->forward(x)).square().mean().item<double>();
  EXPECT_LT(after, 0.5 * before);

  const at::Tensor seen = net->seen.index_select(1, torch::tensor({0, 2, 5, 6, 7}));
  const at::Tensor kept = torch::tensor({1, 2, 4});
  const at::Tensor wanted = dense->norm1(dense->conv1(dense->seen)).index_select(1, kept);
  const at::Tensor inner = net->norm1(net->conv1(net->seen));
  expect_near(inner, best(seen, wanted));
  expect_near(net->joined - net->seen, best(inner.relu(), dense->joined - net->seen));

  ASSERT_EQ(result.layers.size(), 3);
  EXPECT_EQ(result.layers[0].name, "conv1");
  EXPECT_EQ(result.layers[0].samples, 12 * 36);
  EXPECT_EQ(result.layers[0].unknowns, 5 * 9);
  EXPECT_EQ(result.layers[2].name, "head");
  for (const LayerFit& fit : result.layers) EXPECT_LE(fit.after, fit.before) << fit.name;
  const double spread = (wanted - wanted.mean({0, 2, 3}, true)).square().sum().item<double>();
  EXPECT_NEAR(result.layers[0].after, (inner - wanted).square().sum().item<double>() / spread, 1e-6);
}

// conv1 by its own output, conv2 by the sum: what is left of both errors is less than what the factors had before.
TEST_P(BlockTest, FactorsOfEveryLayoutGetNearer) {
  const torch::NoGradGuard no_grad;
  for (const LowRankLayout layout : {LowRankLayout::channel, LowRankLayout::spatial, LowRankLayout::tucker}) {
    LayerPlan conv1 = LayerPlan::unchanged("conv1", LayerKind::conv2d, 8, 6);
    LayerPlan conv2 = LayerPlan::unchanged("conv2", LayerKind::conv2d, 6, 8);
    for (LayerPlan* const plan : {&conv1, &conv2}) {
      plan->rank = 3;
      plan->layout = layout;
      if (layout == LowRankLayout::tucker) plan->rank_in = 4;
    }
    const CompressionPlan plan{.method = "test", .target = 0.0, .layers = {conv1, conv2}};
    BlockNet small(GetParam());
    copy(small, dense);
    cctorch::apply(*small, plan);
    small->eval();
    const auto error = [&] { return (small->forward(x) - dense->forward(x)).square().mean().item<double>(); };
    const double before = error();
    const Repair result = repaired(small, dense, plan, x);
    EXPECT_LT(error(), 0.7 * before) << to_string(layout);
    ASSERT_EQ(result.layers.size(), 3);
    for (const int i : {0, 1}) EXPECT_LT(result.layers[i].after, result.layers[i].before) << to_string(layout);
    EXPECT_EQ(small->conv1->core.defined(), layout == LowRankLayout::tucker);
  }
}

TEST_P(BlockTest, LeavesStatisticsOfItsOwnOutputs) {
  repaired(net, dense, block_plan(), x);
  const torch::NoGradGuard no_grad;
  const at::Tensor y = net->conv1(net->seen);
  expect_near(net->norm1->running_mean, y.mean({0, 2, 3}));
  expect_near(net->norm1->running_var, y.var({0, 2, 3}, /*unbiased=*/false));
}

TEST_P(BlockTest, BatchesOfTheDenseModelDoNotMatter) {
  BlockNet other(GetParam());
  copy(other, dense);
  cctorch::apply(*other, block_plan());
  other->eval();
  repaired(net, dense, block_plan(), x, {.step = 3});
  repaired(other, dense, block_plan(), x, {.step = 3}, 5);
  for (const auto& value : net->named_parameters()) expect_near(value.value(), other->named_parameters()[value.key()]);
}

TEST_P(BlockTest, WithoutShortcutsEachLayerGivesWhatTheDenseOneDoes) {
  const torch::NoGradGuard no_grad;
  repaired(net, dense, block_plan(), x, {.step = 1, .ridge = 1e-12, .shortcuts = false});
  const at::Tensor inner = net->norm1(net->conv1(net->seen)).relu();
  dense->forward(x);
  expect_near(net->norm2(net->conv2(inner)), best(inner, dense->joined - dense->seen));
}

TEST_P(BlockTest, ARemovedBranchBecomesTheMeanOfWhatItGave) {
  BlockNet constant(GetParam());
  copy(constant, dense);
  LayerPlan conv1 = reading("conv1", 8, 6, {}), norm1 = LayerPlan::unchanged("norm1", LayerKind::batch_norm2d, 6, 6),
            conv2 = reading("conv2", 6, 8, {}), norm2 = LayerPlan::unchanged("norm2", LayerKind::batch_norm2d, 8, 8);
  conv1.kept_out = norm1.kept_in = norm1.kept_out = conv2.kept_out = norm2.kept_in = {};
  norm2.kept_out = {0, 1, 2, 3, 4, 5, 6, 7};
  CompressionPlan plan{.method = "test", .target = 0.0, .layers = {conv1, norm1, conv2, norm2}};
  cctorch::apply(*constant, plan);
  constant->eval();
  const Repair result = repaired(constant, dense, plan, x);
  const torch::NoGradGuard no_grad;
  constant->forward(x);
  dense->forward(x);
  expect_near(constant->norm2->bias, (dense->joined - dense->seen).mean({0, 2, 3}));
  expect_near(constant->joined - constant->seen, constant->norm2->bias.view({1, 8, 1, 1}).expand({12, 8, 6, 6}));
  EXPECT_EQ(result.layers.at(0).name, "norm2");
  EXPECT_EQ(result.layers.at(0).after, 1.0);
}

INSTANTIATE_TEST_SUITE_P(All, BlockTest, testing::Values(Sum::plain, Sum::in_place, Sum::reversed));

// The norm stays then, and the target is the convolution's own output.
TEST(RepairModel, AnOutputThatIsUsedAsItIsIsFittedAsItIs) {
  torch::manual_seed(0);
  BlockNet dense(Sum::plain, true), net(Sum::plain, true);
  const at::Tensor x = torch::randn({12, 3, 6, 6}, torch::kDouble);
  shake(dense, x);
  {
    const torch::NoGradGuard no_grad;
    for (auto& value : net->named_parameters()) value.value().copy_(dense->named_parameters()[value.key()]);
    for (auto& value : net->named_buffers()) value.value().copy_(dense->named_buffers()[value.key()]);
  }
  cctorch::apply(*net, block_plan());
  net->eval();
  repaired(net, dense, block_plan(), x);
  const torch::NoGradGuard no_grad;
  EXPECT_TRUE(torch::equal(net->norm2->weight, dense->norm2->weight));
  EXPECT_TRUE(torch::equal(net->norm2->running_mean, dense->norm2->running_mean));
  net->forward(x);
  dense->forward(x);
  const at::Tensor inner = net->norm1(net->conv1(net->seen)).relu();
  const at::Tensor wanted = dense->conv2(dense->norm1(dense->conv1(dense->seen)).relu());
  const auto error = [&](const at::Tensor& y) { return (y - wanted).square().sum().item<double>(); };
  // Without a bias: no more than the best affine function, and than what apply() left.
  EXPECT_GE(error(net->conv2(inner)), error(best(inner, wanted)) - 1e-9);
  EXPECT_LT(error(net->conv2(inner)), 0.9 * wanted.square().sum().item<double>());
}

class TinyTest : public testing::Test {
 protected:
  TinyTest() {
    torch::manual_seed(0);
    x = torch::randn({40, 3, 6, 6}, torch::kDouble);
    shake(dense, x);
    copy_state(net, dense);
    LayerPlan conv3 = LayerPlan::unchanged("conv3", LayerKind::conv2d, 8, 12);
    conv3.rank = 3;
    LayerPlan linear = LayerPlan::unchanged("linear", LayerKind::linear, 12, 4);
    linear.rank = 2;
    plan.layers = {conv3, linear};
  }

  void compress() {
    cctorch::apply(*net, plan);
    net->eval();
  }

  at::Tensor x;
  TinyNet dense, net;
  CompressionPlan plan{.method = "test", .target = 0.0, .layers = {}};
};

TEST_F(TinyTest, FactorsKeepTheirRankAndGetNearer) {
  compress();
  const torch::NoGradGuard no_grad;
  const double before = (net->forward(x) - dense->forward(x)).square().mean().item<double>();
  const auto first = net->conv3->first.sizes().vec();
  const Repair result = repaired(net, dense, plan, x);
  EXPECT_LT((net->forward(x) - dense->forward(x)).square().mean().item<double>(), before);
  EXPECT_EQ(net->conv3->first.sizes(), first);
  ASSERT_EQ(result.layers.size(), 2);  // nothing before the first change
  EXPECT_EQ(result.layers[0].name, "conv3");
  EXPECT_LT(result.layers[0].after, result.layers[0].before);
  EXPECT_TRUE(torch::equal(net->conv2->weight, dense->conv2->weight));
  EXPECT_TRUE(result.warnings.empty());
}

TEST_F(TinyTest, FewSamplesAreSaid) {
  compress();
  x = x.narrow(0, 0, 4);
  const Repair result = repaired(net, dense, plan, x, {.step = 8});
  ASSERT_EQ(result.warnings.size(), 1);
  EXPECT_NE(result.warnings[0].find("fewer samples than an output has weights, first of all 'conv3' ("),
            std::string::npos)
      << result.warnings[0];
}

TEST_F(TinyTest, RefusalsLeaveTheModelAsItWas) {
  const auto expect = [&](const std::function<void()>& call, const std::string& text) {
    std::vector<at::Tensor> before;
    for (const at::Tensor& value : net->parameters()) before.push_back(value.detach().clone());
    const std::string message = refusal(call);
    EXPECT_NE(message.find(text), std::string::npos) << message;
    const auto after = net->parameters();
    for (size_t i = 0; i < after.size(); ++i) EXPECT_TRUE(torch::equal(after[i], before[i]));
  };
  expect([&] { repaired(net, dense, plan, x); }, "'conv3' of the compressed model is dense: apply(model, plan) comes");
  compress();
  expect([&] { repaired(net, net, plan, x); }, "'conv3' of the dense model is compressed");
  expect([&] { repaired(net, dense, plan, x.narrow(0, 0, 0)); }, "no images on a rank");
  expect([&] { repair(*net, [&] { net->forward(x); }, *dense, [] { return false; }, plan, 40); }, "ran no batch");
  expect([&] { repair(*net, [&] { net->forward(x); }, *dense, batches(dense, x, 7), plan, 41); },
         "next_dense ran 40 images, expected the 41");
  at::Tensor bad = x.clone();
  bad[3][0][0][0] = std::numeric_limits<double>::quiet_NaN();
  expect([&] { repaired(net, dense, plan, bad); }, "repair: layer 'conv3': ");
  expect([&] { repair(*net, [&] { net->forward(x.narrow(0, 0, 9)); }, *dense, batches(dense, x, 7), plan, 40); },
         "repair: layer 'conv3': ");
  const auto late = [&] {
    net->forward(x);
    TORCH_CHECK_VALUE(false, "too late");
  };
  expect([&] { repair(*net, late, *dense, batches(dense, x, 40), plan, 40); }, "too late");
  LayerPlan bits = plan.layers[0];
  bits.bits = 4;
  prepare(*net, {.method = "", .target = 0.0, .layers = {bits}});
  expect([&] { repaired(net, dense, plan, x); }, "'conv3' is prepared: repair() comes before prepare()");
}

}  // namespace
}  // namespace cctorch::repair
