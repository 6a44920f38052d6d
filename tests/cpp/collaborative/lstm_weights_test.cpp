#include <cctorch/collaborative.h>
#include <gtest/gtest.h>
#include <torch/types.h>

#include <algorithm>
#include <string>
#include <vector>

#include "tests/cpp/refusal.h"

namespace cctorch::collaborative {
namespace {

Layer layer_of(const std::string& name, LayerKind kind) {
  const at::TensorOptions type = torch::dtype(at::kDouble);
  return {{name, kind, 24, 64, 1, 1, 7}, torch::randn({64, 24}, type), torch::randn({64, 24}, type)};
}

std::vector<Layer> layers() {
  torch::manual_seed(0);
  return {layer_of("linear", LayerKind::linear), layer_of("r.weight_hh_l0", LayerKind::lstm)};
}

// Nothing but singular values, whichever way the search takes, also where the linear layer loses channels.
TEST(LstmWeights, GiveUpSingularValuesAlone) {
  for (const Budget budget : {Budget::macs, Budget::parameters, Budget::bytes}) {
    for (const int64_t multiple : {1, 4}) {
      Options options{.target = 0.4, .budget = budget, .multiple = multiple};
      const std::vector<Layer> searched = layers();
      const std::vector<LayerSpec> model{searched[0].spec, searched[1].spec};
      const auto dense = static_cast<double>(remaining(model, {}, budget, false));
      const Solution solution = solve(searched, dense, options);
      const LayerPlan *const linear = solution.plan.find("linear"), *const lstm = solution.plan.find("r.weight_hh_l0");
      EXPECT_EQ(lstm->kept_in.size(), 24);
      EXPECT_EQ(lstm->kept_out.size(), 64);
      ASSERT_TRUE(lstm->rank.has_value());
      EXPECT_EQ(*lstm->rank % multiple, 0);
      EXPECT_LT(linear->kept_in.size(), 24);
      EXPECT_LE(static_cast<double>(remaining(model, solution.plan, budget, false)), 0.6 * dense);
    }
  }
}

// The truncated SVD's ranks are those of a search for singular values alone.
TEST(LstmWeights, AreSearchedAsALinearLayerForSingularValues) {
  const Layer lstm = layers()[1];
  Layer linear = lstm;
  linear.spec.kind = LayerKind::linear;
  const double dense = static_cast<double>(lstm.spec.macs());
  for (const int64_t multiple : {1, 4}) {
    Options both{.target = 0.5, .multiple = multiple}, values = both;
    values.units = Units::singular_values;
    const Solution ours = solve({lstm}, dense, both), theirs = solve({linear}, dense, values);
    EXPECT_EQ(ours.plan.layers[0].rank, theirs.plan.layers[0].rank);
    EXPECT_TRUE(ours.plan.layers[0].rank.has_value());
  }
}

TEST(LstmWeights, TakeNoPartWhereChannelsAloneGo) {
  const LayerSpec conv{"conv", LayerKind::conv2d, 3, 8, 3, 3, 4}, head{"head", LayerKind::linear, 24, 5};
  const Layer lstm = layers()[1];
  const std::vector<LayerSpec> model{conv, lstm.spec, head};
  for (const Units units : {Units::both, Units::singular_values}) {
    const std::vector<LayerSpec> chosen = participants(model, units);
    ASSERT_EQ(chosen.size(), 1);
    EXPECT_EQ(chosen[0].name, "r.weight_hh_l0");
  }
  EXPECT_TRUE(participants(model, Units::channels).empty());
  Options channels{.target = 0.2};
  channels.units = Units::channels;
  const std::string text = refusal([&] { solve({lstm}, static_cast<double>(lstm.spec.macs()), channels); });
  EXPECT_NE(text.find("'r.weight_hh_l0' is a weight of an lstm"), std::string::npos) << text;
}

}  // namespace
}  // namespace cctorch::collaborative
