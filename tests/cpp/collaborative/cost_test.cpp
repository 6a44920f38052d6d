#include "csrc/collaborative/cost.h"

#include <c10/util/Exception.h>
#include <cctorch/nn/layers.h>
#include <gtest/gtest.h>

namespace cctorch::collaborative {
namespace {

const LayerSpec layer{"layer", LayerKind::conv2d, 20, 32, 3, 3, 49};

// Channels 8, 16, 20; ranks 8, 24.
CostTable table() { return {{8, 16, 20}, {8, 24}, {10, 30, 40}, {4, 20, 9, 25, 12, 28}, 1}; }

TEST(Cost, IsLinearBetweenTheCountsOfTheTable) {
  const Cost cost(layer, table());
  EXPECT_DOUBLE_EQ(cost.dense(), 40);
  EXPECT_DOUBLE_EQ(cost.cheapest(16, {}).cost, 30);
  EXPECT_DOUBLE_EQ(cost.cheapest(10, {}).cost, 15);    // 10 + 2/8 * 20
  EXPECT_DOUBLE_EQ(cost.cheapest(20, 12).cost, 16);    // 12 + 4/16 * 16
  EXPECT_DOUBLE_EQ(cost.cheapest(12, 16).cost, 14.5);  // halfway between 12 and 17
  EXPECT_DOUBLE_EQ(cost.cheapest(3, {}).cost, 10);     // no cheaper than the smallest that was measured
  EXPECT_EQ(cost.cheapest(3, {}).channels, 8);
}

TEST(Cost, OfACountThatIsNoMultipleIsThatOfTheNext) {
  CostTable steps = table();
  steps.multiple = 8;
  const Cost cost(layer, steps);
  for (int64_t channels = 9; channels <= 16; ++channels) {
    EXPECT_DOUBLE_EQ(cost.cheapest(channels, {}).cost, 30);
    EXPECT_EQ(cost.cheapest(channels, {}).channels, 16);
  }
  EXPECT_EQ(cost.cheapest(17, {}).channels, 20);
  const Form form = cost.cheapest(5, 9);
  EXPECT_DOUBLE_EQ(form.cost, 10);  // rank 16 would cost 12, pruning alone costs 10
  EXPECT_FALSE(form.rank.has_value());
  EXPECT_EQ(cost.cheapest(18, 9).rank, 16);
}

TEST(Cost, OfFewerIsNeverMoreThanOfMore) {
  const Cost cost(layer, {{8, 16, 20}, {8, 16}, {25, 50, 40}, {9, 5, 30, 20, 30, 30}, 4});
  EXPECT_DOUBLE_EQ(cost.cheapest(16, {}).cost, 40);
  EXPECT_EQ(cost.cheapest(16, {}).channels, 20);
  EXPECT_DOUBLE_EQ(cost.cheapest(8, 8).cost, 5);
  EXPECT_EQ(cost.cheapest(8, 8).rank, 16);
}

TEST(Cost, AFactoredFormIsTakenOnlyWhereItIsCheaper) {
  const Cost cost(layer, table());
  EXPECT_EQ(cost.cheapest(20, 24).rank, 24);  // 28 < 40
  EXPECT_FALSE(cost.cheapest(8, 24).rank);    // 20 > 10
  EXPECT_FALSE(cost.cheapest(20, 25).rank);   // not in the table
  EXPECT_TRUE(cost.factoring_pays());
  EXPECT_FALSE(Cost(layer, {{8, 20}, {8}, {10, 40}, {11, 41}, 1}).factoring_pays());
  EXPECT_FALSE(Cost(layer, {{8, 20}, {}, {10, 40}, {}, 1}).factoring_pays());
}

TEST(Budget, BytesAreParametersInTheBitsOfEachLayer) {
  LayerSpec conv{"conv", LayerKind::conv2d, 3, 5, 3, 3, 16}, linear{"linear", LayerKind::linear, 7, 2};
  conv.bits = 3;
  linear.bits = 16;
  EXPECT_EQ(remaining({conv, linear}, {}, Budget::parameters, true), 135 + 14);
  EXPECT_EQ(remaining({conv, linear}, {}, Budget::bytes, true), 51 + 28);  // 135 times 3 bits are 50.6 bytes
  LayerPlan factored = LayerPlan::unchanged("conv", LayerKind::conv2d, 3, 5);
  factored.kept_in = {0, 2};
  factored.kept_out = {1, 2, 3};
  factored.rank = 2;
  const CompressionPlan plan{.method = "", .target = 0, .layers = {factored}};
  EXPECT_EQ(remaining({conv, linear}, plan, Budget::bytes, true), 16 + 28);   // (2 * 9 + 3) * 2 times 3 bits
  EXPECT_EQ(remaining({conv, linear}, plan, Budget::bytes, false), 18 + 28);  // with all 5 filters
}

TEST(Budget, ALayerStoresItsWeightsInTheBitsOfTheirType) {
  nn::Conv2d conv(4, 6, 3);
  nn::Linear linear(4, 6);
  EXPECT_EQ(conv->spec("conv").bits, 32);
  conv->to(torch::kBFloat16);
  linear->to(torch::kDouble);
  EXPECT_EQ(conv->spec("conv").bits, 16);
  EXPECT_EQ(linear->spec("linear").bits, 64);
  LayerPlan factored = LayerPlan::unchanged("linear", LayerKind::linear, 4, 6);
  factored.rank = 2;
  linear->compress(factored);
  EXPECT_EQ(linear->spec("linear").bits, 64);
}

TEST(Cost, RefusesATableThatDoesNotFit) {
  const auto refused = [](const CostTable& bad) { EXPECT_THROW(Cost(layer, bad), c10::ValueError); };
  refused({});
  refused({{8, 16}, {}, {1, 2}, {}, 1});         // not all 20 channels
  refused({{16, 8, 20}, {}, {1, 2, 3}, {}, 1});  // not rising
  refused({{8, 20}, {4}, {1, 2}, {1}, 1});       // a factored cost is missing
  refused({{8, 20}, {}, {1, 0}, {}, 1});         // free
  refused({{8, 20}, {}, {1, 2}, {}, 0});
}

}  // namespace
}  // namespace cctorch::collaborative
