#include <ATen/ATen.h>
#include <cctorch/collaborative.h>
#include <gtest/gtest.h>

#include <vector>

#include "csrc/collaborative/matrix.h"

namespace cctorch::collaborative {
namespace {

Layer layer(const std::string& name, at::IntArrayRef sizes, int64_t stride = 1) {
  Layer made;
  made.spec = {.name = name,
               .in_channels = sizes[1],
               .out_channels = sizes[0],
               .kernel_height = sizes[2],
               .kernel_width = sizes[3],
               .positions = 20,
               .stride_height = stride};
  made.weight = at::randn(sizes);
  made.gradient = at::randn(sizes) * at::rand({1, sizes[1], 1, 1});
  return made;
}

std::vector<Layer> network() {
  at::manual_seed(0);
  return {layer("square", {12, 8, 3, 3}), layer("high", {10, 12, 5, 1}), layer("wide", {10, 12, 1, 5}),
          layer("strided", {14, 12, 3, 3}, 2), layer("point", {16, 14, 1, 1})};
}

double macs(const std::vector<Layer>& layers) {
  double sum = 0;
  for (const Layer& each : layers) sum += static_cast<double>(each.spec.macs());
  return sum;
}

TEST(Layout, OneDimensionalKernelsAreForHighKernelsThatDoNotStride) {
  const std::vector<Layer> layers = network();
  const Options options{.target = 0.6, .units = Units::singular_values, .layout = LowRankLayout::spatial};
  const Solution found = solve(layers, macs(layers), options);
  for (size_t l = 0; l < layers.size(); ++l) {
    const LayerPlan& plan = found.plan.layers[l];
    const bool spatial = plan.name == "square" || plan.name == "high";
    ASSERT_TRUE(plan.rank) << plan.name;
    EXPECT_EQ(plan.layout, spatial ? LowRankLayout::spatial : LowRankLayout::channel) << plan.name;
    EXPECT_EQ(plan.out_channels, layers[l].spec.out_channels);
  }
  double left = 0;
  for (const Layer& each : layers)
    left += static_cast<double>(layer_macs(each.spec, found.plan.find(each.spec.name), false));
  EXPECT_LE(left, 0.4 * macs(layers) * (1 + 1e-9));
}

// What (E1) says of the plan's weight, from the singular values of the matrix of the two kernels.
TEST(Layout, LossesAreThoseOfTheTwoKernels) {
  const std::vector<Layer> layers{layer("square", {12, 8, 3, 3})};
  const Options options{
      .target = 0.5, .units = Units::singular_values, .multiple = 2, .layout = LowRankLayout::spatial};
  const Solution found = Search(layers, macs(layers), options).at(0.5);
  const int64_t rank = found.plan.layers[0].rank.value();
  const at::Tensor weight = layers[0].weight.to(at::kDouble);
  const at::Tensor matrix = weight.permute({0, 2, 1, 3}).reshape({36, 24});
  const auto [u, values, vh] = at::linalg_svd(matrix, /*full_matrices=*/false);
  const at::Tensor low = at::mm(u.slice(1, 0, rank) * values.slice(0, 0, rank), vh.slice(0, 0, rank));
  const at::Tensor change = low.view({12, 3, 8, 3}).permute({0, 2, 1, 3}) - weight;
  const double expected = (layers[0].gradient * change).square().sum().item<double>();
  EXPECT_NEAR(found.losses[0], expected, 1e-4 * expected);
}

TEST(Layout, OfAMatrixAlone) {
  const std::vector<Layer> layers = network();
  EXPECT_THROW(solve(layers, macs(layers), {.layout = LowRankLayout::tucker}), c10::Error);
}

}  // namespace
}  // namespace cctorch::collaborative
