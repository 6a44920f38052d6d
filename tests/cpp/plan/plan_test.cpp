#include <c10/util/Exception.h>
#include <cctorch/plan.h>
#include <gtest/gtest.h>

#include <limits>
#include <sstream>

#include "tests/cpp/refusal.h"

namespace cctorch {
namespace {

CompressionPlan example() {
  CompressionPlan plan;
  plan.method = "by hand";
  plan.target = 0.25;
  LayerPlan conv = LayerPlan::unchanged("conv", LayerKind::conv2d, 4, 6);
  conv.kept_in = {0, 2, 3};
  conv.kept_out = {1, 2, 5};
  conv.gather = {0, 1, 3};
  conv.rank = 2;
  conv.mask = MaskPlan{MaskPlan::Kind::nm, 0.0, 1, 4};
  conv.bits = 4;
  LayerPlan linear = LayerPlan::unchanged("head", LayerKind::linear, 8, 3);
  linear.mask = MaskPlan{MaskPlan::Kind::channel, 0.1, 2, 4};
  LayerPlan spatial = LayerPlan::unchanged("spatial", LayerKind::conv2d, 4, 2);
  spatial.rank = 5;  // of 2 x 3 rows
  spatial.layout = LowRankLayout::spatial;
  LayerPlan tucker = LayerPlan::unchanged("tucker", LayerKind::conv2d, 4, 6);
  tucker.rank = 6;
  tucker.layout = LowRankLayout::tucker;
  tucker.rank_in = 3;
  plan.layers = {conv, linear, spatial, tucker};
  return plan;
}

TEST(Plan, JsonRoundTrip) {
  const CompressionPlan plan = example();
  EXPECT_EQ(CompressionPlan::from_json(plan.to_json()), plan);
}

TEST(Plan, EveryTruncationOfTheJsonIsRefused) {
  const std::string text = example().to_json();
  for (size_t length = 0; length + 2 < text.size(); ++length) {
    EXPECT_THROW(CompressionPlan::from_json(std::string_view(text).substr(0, length)), c10::Error) << length;
  }
}

TEST(Plan, WritesNothingThatItCouldNotRead) {
  CompressionPlan plan{.method = "by hand", .layers = {LayerPlan::unchanged("a", LayerKind::conv2d, 2, 2)}};
  plan.target = std::numeric_limits<double>::quiet_NaN();
  EXPECT_NE(refusal([&] { plan.to_json(); }).find("target = nan, expected a finite number"), std::string::npos);
  plan.target = 0.5;
  plan.layers[0].mask = MaskPlan{.sparsity = std::numeric_limits<double>::infinity()};
  EXPECT_NE(refusal([&] { plan.to_json(); }).find("mask sparsity = inf"), std::string::npos);
  plan.layers[0].mask.reset();
  plan.layers[0].name = "\xff";
  EXPECT_NE(refusal([&] { plan.to_json(); }).find("invalid UTF-8"), std::string::npos);
}

TEST(Plan, ErrorsNameLayerAndField) {
  CompressionPlan plan = example();
  plan.layers[0].kept_in = {0, 4, 5};
  const std::string message = refusal([&] { plan.validate(); });
  EXPECT_NE(message.find("'conv'"), std::string::npos) << message;
  EXPECT_NE(message.find("kept_in[1] = 4"), std::string::npos) << message;
}

TEST(Plan, RefusesUnsortedRepeatedEmptyAndDuplicateNames) {
  const auto refused = [](const auto& change) {
    CompressionPlan plan = example();
    change(plan);
    return !refusal([&] { plan.validate(); }).empty();
  };
  EXPECT_FALSE(refused([](CompressionPlan&) {}));
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.layers[0].kept_in = {2, 0, 3}; }));
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.layers[0].kept_out = {1, 1, 5}; }));
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.layers[0].kept_out = {}; }));
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.layers[0].rank = 7; }));
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.layers[0].rank = 0; }));
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.layers[0].bits = 1; }));
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.layers[0].gather = {0, 1}; }));
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.layers[1].name = "conv"; }));
  EXPECT_TRUE(refused([](CompressionPlan& p) { p.layers[1].mask->sparsity = 1.0; }));
}

TEST(Plan, ALayerThatReadsNothingHasNothingElse) {
  const auto refused = [](const auto& change) {
    CompressionPlan plan;
    plan.layers = {LayerPlan::unchanged("conv", LayerKind::conv2d, 4, 6)};
    plan.layers[0].kept_in.clear();
    change(plan.layers[0]);
    return refusal([&] { plan.validate(); });
  };
  EXPECT_EQ(refused([](LayerPlan&) {}), "");
  EXPECT_EQ(refused([](LayerPlan& layer) { layer.kept_out.clear(); }), "");
  EXPECT_EQ(refused([](LayerPlan& layer) { layer.kind = LayerKind::batch_norm2d; }), "");
  EXPECT_NE(refused([](LayerPlan& layer) { layer.rank = 1; }), "");
  EXPECT_NE(refused([](LayerPlan& layer) { layer.bits = 4; }), "");
  EXPECT_NE(refused([](LayerPlan& layer) { layer.mask = MaskPlan{}; }), "");
  EXPECT_NE(refused([](LayerPlan& layer) { layer.kept_out = {6}; }), "");
  const LayerSpec spec{"conv", LayerKind::conv2d, 4, 6, 3, 3, 100, 1};
  LayerPlan plan = LayerPlan::unchanged("conv", LayerKind::conv2d, 4, 6);
  plan.kept_in.clear();
  EXPECT_EQ(layer_macs(spec, &plan, true), 0);
  EXPECT_EQ(layer_macs(spec, &plan, false), 0);
}

TEST(Plan, AWeightOfAnLstmHasARankAndNothingElse) {
  LayerPlan layer = LayerPlan::unchanged("r.weight_ih_l0", LayerKind::lstm, 6, 16);
  layer.rank = 3;
  CompressionPlan plan{.method = "", .target = 0.0, .layers = {layer}};
  EXPECT_EQ(CompressionPlan::from_json(plan.to_json()), plan);
  EXPECT_NE(plan.to_json().find("\"lstm\""), std::string::npos);
  const LayerSpec spec{"r.weight_ih_l0", LayerKind::lstm, 6, 16, 1, 1, 5};
  EXPECT_EQ(spec.macs(), 6 * 16 * 5);
  EXPECT_EQ(final_macs({spec}, plan), (6 + 16) * 3 * 5);

  const auto refused = [&](const auto& change) {
    CompressionPlan changed = plan;
    change(changed.layers[0]);
    return refusal([&] { changed.validate(); });
  };
  EXPECT_NE(refused([](LayerPlan& l) { l.rank = 7; }).find("rank = 7, expected 1 to 6"), std::string::npos);
  const std::string other = "'r.weight_ih_l0': a weight of an lstm keeps all";
  EXPECT_NE(refused([](LayerPlan& l) { l.kept_in = {0, 1}; }).find(other), std::string::npos);
  EXPECT_NE(refused([](LayerPlan& l) { l.kept_in.clear(); }).find(other), std::string::npos);
  EXPECT_NE(refused([](LayerPlan& l) { l.kept_out.pop_back(); }).find(other), std::string::npos);
  EXPECT_NE(refused([](LayerPlan& l) { l.mask = MaskPlan{}; }).find(other), std::string::npos);
  EXPECT_NE(refused([](LayerPlan& l) { l.bits = 4; }).find(other), std::string::npos);
}

TEST(Plan, RanksFitTheirLayout) {
  const auto message = [](LayerKind kind, std::optional<int64_t> rank, LowRankLayout layout,
                          std::optional<int64_t> rank_in) {
    LayerPlan layer = LayerPlan::unchanged("a", kind, 4, 6);
    layer.rank = rank;
    layer.layout = layout;
    layer.rank_in = rank_in;
    return refusal([&] { CompressionPlan{.method = "", .target = 0.0, .layers = {layer}}.validate(); });
  };
  using enum LowRankLayout;
  const LayerKind conv = LayerKind::conv2d;
  EXPECT_EQ(message(conv, 6, tucker, 4), "");
  EXPECT_EQ(message(conv, 18, spatial, std::nullopt), "");
  EXPECT_NE(message(conv, std::nullopt, spatial, std::nullopt).find("layout = spatial"), std::string::npos);
  EXPECT_NE(message(LayerKind::linear, 3, tucker, 3).find("layout = tucker"), std::string::npos);
  EXPECT_NE(message(LayerKind::lstm, 3, spatial, std::nullopt).find("layout channel"), std::string::npos);
  EXPECT_NE(message(conv, 3, tucker, std::nullopt).find("has a rank_in too"), std::string::npos);
  EXPECT_NE(message(conv, 3, channel, 3).find("rank_in is for the layout tucker"), std::string::npos);
  EXPECT_NE(message(conv, 7, tucker, 4).find("rank = 7"), std::string::npos);
  EXPECT_NE(message(conv, 6, tucker, 5).find("rank_in = 5"), std::string::npos);
  EXPECT_NE(message(conv, 6, tucker, 0).find("rank_in = 0"), std::string::npos);
  EXPECT_NE(message(conv, 0, spatial, std::nullopt).find("rank = 0"), std::string::npos);
  LayerPlan nothing = LayerPlan::unchanged("a", conv, 4, 6);
  nothing.kept_in = nothing.kept_out = {};
  nothing.layout = tucker;
  nothing.rank_in = 5;
  const std::string said = refusal([&] { CompressionPlan{.method = "", .layers = {nothing}}.validate(); });
  EXPECT_NE(said.find("takes no gather, rank, layout"), std::string::npos) << said;
  const std::string text = R"({"cctorch_plan": 1, "method": "", "target": 0.0, "layers": [{"name": "a",
    "kind": "conv2d", "in_channels": 4, "out_channels": 6, "rank": 2, "layout": "diagonal"}]})";
  EXPECT_NE(refusal([&] { CompressionPlan::from_json(text); }).find("layout 'diagonal'"), std::string::npos);
}

TEST(Plan, CountsMultiplyAccumulatesByHand) {
  const std::vector<LayerSpec> model = {{"conv", LayerKind::conv2d, 4, 6, 3, 3, 100, 1},
                                        {"head", LayerKind::linear, 8, 3, 1, 1, 1, 1},
                                        {"bn", LayerKind::batch_norm2d, 6, 6, 1, 1, 100, 1}};
  CompressionPlan plan = example();
  EXPECT_EQ(dense_macs(model), 6 * 4 * 9 * 100 + 8 * 3);
  EXPECT_EQ(nominal_macs(model, plan), (3 * 9 * 2 + 2 * 6) * 100 + 8 * 3);
  EXPECT_EQ(final_macs(model, plan), (3 * 9 * 2 + 2 * 3) * 100 + 8 * 3);
  plan.layers[0].rank.reset();
  EXPECT_EQ(final_macs(model, plan), 3 * 3 * 9 * 100 + 8 * 3);
}

TEST(Plan, DropsRanksThatSaveNothingOnceFiltersAreGone) {
  const std::vector<LayerSpec> model = {
      {.name = "a", .in_channels = 16, .out_channels = 16, .kernel_height = 3, .kernel_width = 3},
      {.name = "b", .kind = LayerKind::linear, .in_channels = 8, .out_channels = 12}};
  CompressionPlan plan;
  plan.layers = {LayerPlan::unchanged("a", LayerKind::conv2d, 16, 16),
                 LayerPlan::unchanged("b", LayerKind::linear, 8, 12)};
  plan.layers[0].kept_in = {0, 1, 2, 3, 4, 5, 6, 7};
  plan.layers[0].rank = 10;
  plan.layers[1].rank = 4;
  const auto ranks = [&] {
    CompressionPlan dropped = plan;
    drop_idle_ranks(model, dropped);
    return std::pair(dropped.layers[0].rank, dropped.layers[1].rank);
  };
  // a: 10 (72 + 16) < 16 * 72. b: 4 (8 + 12) < 8 * 12.
  EXPECT_EQ(ranks(), std::pair(std::optional<int64_t>(10), std::optional<int64_t>(4)));
  plan.layers[0].kept_out.resize(11);  // 10 (72 + 11) > 11 * 72
  EXPECT_EQ(ranks(), std::pair(std::optional<int64_t>(), std::optional<int64_t>(4)));
  plan.layers[1].kept_out.resize(8);  // 4 (8 + 8) = 8 * 8
  EXPECT_EQ(ranks().second, std::nullopt);
}

TEST(Plan, PrintsOnlyWhatChanges) {
  CompressionPlan plan = example();
  plan.layers[1].mask.reset();
  std::ostringstream text;
  text << plan;
  EXPECT_NE(text.str().find("conv"), std::string::npos);
  EXPECT_EQ(text.str().find("head"), std::string::npos);
}

}  // namespace
}  // namespace cctorch
