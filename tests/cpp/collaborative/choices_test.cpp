#include <cctorch/collaborative.h>
#include <gtest/gtest.h>
#include <torch/types.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "tests/cpp/refusal.h"

namespace cctorch::collaborative {
namespace {

// Choices of given costs and losses; the plans are told apart by their counts of inputs.
LayerChoices layer_of(const std::string& name, const std::vector<std::pair<double, double>>& costs_and_losses) {
  LayerChoices layer{.name = name, .largest_loss = 1.0, .choices = {}};
  for (const auto& [cost, loss] : costs_and_losses) {
    Choice choice{cost, loss, LayerPlan::unchanged(name, LayerKind::conv2d, 8, 4)};
    choice.plan.kept_in.resize(8 - layer.choices.size());
    layer.choices.push_back(choice);
  }
  return layer;
}

size_t chosen(const Solution& solution, const LayerChoices& layer) {
  return 8 - solution.plan.find(layer.name)->kept_in.size();
}

TEST(Choices, ImportanceDecidesWhichOfTwoEqualLayersGives) {
  std::vector<LayerChoices> layers = {layer_of("a", {{10, 0}, {5, 0.5}}), layer_of("b", {{10, 0}, {5, 0.5}})};
  for (const bool first : {true, false}) {
    layers[0].importance = first ? 1 : 3;
    layers[1].importance = first ? 3 : 1;
    const Solution solution = select(layers, 20, 0.2);
    EXPECT_EQ(chosen(solution, layers[0]), first ? 1 : 0);
    EXPECT_EQ(chosen(solution, layers[1]), first ? 0 : 1);
  }
}

// By brute force over all combinations.
TEST(Choices, TheCheapestCombinationByImportance) {
  std::vector<LayerChoices> layers = {layer_of("a", {{10, 0}, {6, 0.1}, {0, 1}}),
                                      layer_of("b", {{8, 0}, {5, 0.3}, {0, 1}}),
                                      layer_of("c", {{20, 0}, {11, 0.2}, {0, 1}})};
  const std::vector<double> importance = {0.2, 3.0, 0.7};
  for (size_t l = 0; l < 3; ++l) layers[l].importance = importance[l];
  for (const double target : {0.1, 0.25, 0.5, 0.75}) {
    const Solution solution = select(layers, 38, target);
    double best = std::numeric_limits<double>::infinity();
    double found = 0, removed = 0;
    for (size_t l = 0; l < 3; ++l) {
      const Choice& choice = layers[l].choices[chosen(solution, layers[l])];
      found += importance[l] * std::sqrt(choice.loss);
      removed += layers[l].choices[0].cost - choice.cost;
    }
    for (size_t i = 0; i < 27; ++i) {
      const std::array<size_t, 3> choice = {i / 9, i / 3 % 3, i % 3};
      double loss = 0, gone = 0;
      for (size_t l = 0; l < 3; ++l) {
        loss += importance[l] * std::sqrt(layers[l].choices[choice[l]].loss);
        gone += layers[l].choices[0].cost - layers[l].choices[choice[l]].cost;
      }
      if (gone >= target * 38) best = std::min(best, loss);
    }
    EXPECT_GE(removed, target * 38);
    EXPECT_NEAR(found, best, 1e-12) << target;
  }
}

TEST(Choices, AllLayersHaveAnImportanceOrNone) {
  std::vector<LayerChoices> layers = {layer_of("a", {{10, 0}, {5, 0.5}}), layer_of("b", {{10, 0}, {5, 0.5}})};
  layers[0].importance = 1;
  EXPECT_NE(refusal([&] { select(layers, 20, 0.2); }).find("expected all or none"), std::string::npos);
}

Layer whole_layer() {
  Layer layer;
  layer.spec = {"conv", LayerKind::conv2d, 8, 4, 3, 3, 16, 1};
  layer.weight = torch::randn({4, 8, 3, 3});
  layer.gradient = torch::randn({4, 8, 3, 3});
  layer.table = {.channels = {4, 8}, .ranks = {}, .pruned = {2.0, 3.0}, .factored = {}, .multiple = 4, .removed = 0.5};
  return layer;
}

TEST(Choices, TheLastChoiceOfALayerThatCanGoIsNothing) {
  Options options;
  options.budget = Budget::table;
  const LayerChoices choices = layer_choices({whole_layer()}, options).front();
  EXPECT_EQ(choices.choices.back().cost, 0.5);
  EXPECT_EQ(choices.choices.back().loss, choices.largest_loss);
  EXPECT_TRUE(choices.choices.back().plan.reads_nothing());
  EXPECT_FALSE(choices.choices[choices.choices.size() - 2].plan.reads_nothing());
  Layer bounded = whole_layer();
  bounded.max_rate = 0.9;
  const LayerChoices stays = layer_choices({bounded}, options).front();
  for (const Choice& choice : stays.choices) EXPECT_FALSE(choice.plan.reads_nothing());
}

// (E1) adds up over columns: by brute force on the whole layer.
TEST(Choices, WhatWentBeforeIsLostInEveryChoice) {
  Options options;
  options.budget = Budget::table;
  options.units = Units::channels;
  const Layer whole = whole_layer();
  const at::Tensor columns = (whole.weight * whole.gradient).to(torch::kDouble).square().sum({0, 2, 3});
  const std::vector<int64_t> left = {1, 2, 4, 5, 6, 7};
  Layer narrow = whole;
  narrow.spec.in_channels = 6;
  narrow.weight = whole.weight.index_select(1, torch::tensor(left));
  narrow.gradient = whole.gradient.index_select(1, torch::tensor(left));
  narrow.table = {.channels = {2, 4, 6}, .ranks = {}, .pruned = {1.0, 2.0, 3.0}, .factored = {}, .multiple = 2};
  narrow.lost = (columns[0] + columns[3]).item<double>();
  narrow.cost_before = 4;

  const LayerChoices found = layer_choices({narrow}, options).front();
  EXPECT_NEAR(found.largest_loss, columns.sum().item<double>(), 1e-5 * found.largest_loss);
  EXPECT_EQ(found.choices.size(), 3U);
  for (const Choice& choice : found.choices) {
    double lost = columns.sum().item<double>();
    for (const int64_t kept : choice.plan.kept_in) lost -= columns[left[kept]].item<double>();
    EXPECT_NEAR(choice.loss, lost, 1e-5 * found.largest_loss);
    EXPECT_NEAR(found.objective(choice.loss), 4.0 * lost / found.largest_loss, 1e-5);
  }
}

TEST(Choices, RefusesCostsAndImportancesThatAreNone) {
  Options options;
  options.budget = Budget::table;
  for (const double bad : {-1.0, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    Layer layer = whole_layer();
    layer.table.removed = bad;
    EXPECT_NE(refusal([&] { layer_choices({layer}, options); }).find("removed"), std::string::npos) << bad;
    layer = whole_layer();
    layer.importance = bad;
    EXPECT_NE(refusal([&] { layer_choices({layer}, options); }).find("importance"), std::string::npos) << bad;
    layer = whole_layer();
    layer.lost = bad;
    EXPECT_NE(refusal([&] { layer_choices({layer}, options); }).find("lost"), std::string::npos) << bad;
    layer = whole_layer();
    layer.cost_before = bad;
    EXPECT_NE(refusal([&] { layer_choices({layer}, options); }).find("cost_before"), std::string::npos) << bad;
  }
}

}  // namespace
}  // namespace cctorch::collaborative
