#include <ATen/ATen.h>
#include <cctorch/mask.h>
#include <gtest/gtest.h>

#include "csrc/ops/mask.h"

namespace cctorch {
namespace {

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
