#include <ATen/ATen.h>
#include <cctorch/mask.h>
#include <gtest/gtest.h>

#include <limits>

#include "../../../csrc/ops/mask.h"

namespace cctorch {
namespace {

at::Tensor with_ties(at::IntArrayRef shape, at::ScalarType type) { return at::randint(-4, 5, shape).div(4).to(type); }

TEST(Mask, KeptCountIsThatOfTheDecimalFraction) {
  EXPECT_EQ(kept_count(0.9, 10), 1);
  EXPECT_EQ(kept_count(0.7, 10), 3);
  EXPECT_EQ(kept_count(0.07, 100), 93);
  EXPECT_EQ(kept_count(0.0, 7), 7);
  EXPECT_EQ(kept_count(1.0, 7), 0);
  EXPECT_EQ(kept_count(0.5, 7), 3);
  for (int64_t percent = 0; percent <= 100; ++percent) {
    EXPECT_EQ(kept_count(static_cast<double>(percent) / 100, 25'000'000), (100 - percent) * 250'000) << percent;
  }
}

// The path of the other devices against the CPU's: both exact, so equal.
TEST(Mask, CompositeEqualsTheCpuKernels) {
  for (const auto type : {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16}) {
    const auto conv = with_ties({4, 8, 3, 3}, type).contiguous(at::MemoryFormat::ChannelsLast);
    const std::vector<at::Tensor> weights{conv, with_ties({70}, type), at::randn({30, 30}).to(type),
                                          at::empty({0}, type)};
    for (const double sparsity : {0.0, 0.3, 0.5, 0.9, 1.0}) {
      const auto masks = magnitude_masks(weights, sparsity);
      const auto composite_masks = composite::magnitude_masks(weights, sparsity);
      for (size_t i = 0; i < weights.size(); ++i) {
        EXPECT_TRUE(masks[i].equal(composite_masks[i])) << "weights[" << i << "], sparsity " << sparsity;
        EXPECT_EQ(masks[i].strides(), composite_masks[i].strides());
      }
    }
    for (const int64_t axis : {1, 0, -3}) {
      EXPECT_TRUE(nm_mask(conv, 2, 4, axis).equal(composite::nm_mask(conv, 2, 4, axis))) << "axis " << axis;
    }
  }
}

TEST(Mask, CompositeTakesNanForTheLargest) {
  const auto weight = at::tensor({1.0f, std::numeric_limits<float>::quiet_NaN(), 3.0f, 2.0f});
  const auto mask = composite::magnitude_masks({weight}, 0.5)[0];
  EXPECT_TRUE(mask.equal(at::tensor({0, 1, 1, 0}).to(at::kBool)));
  EXPECT_THROW(magnitude_masks({weight}, 0.5), c10::Error);
}

TEST(Mask, GradientReachesDroppedWeights) {
  const auto weight = at::randn({4, 4}).requires_grad_();
  const auto mask = channel_mask(weight, 0.5);
  EXPECT_EQ(mask.sum().item<int64_t>(), 8);
  const auto y = apply_mask(weight, mask);
  EXPECT_TRUE(y.equal(weight * mask));
  y.sum().backward();
  EXPECT_TRUE(weight.grad().equal(at::ones({4, 4})));
}

}  // namespace
}  // namespace cctorch
