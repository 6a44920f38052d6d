#include <ATen/ATen.h>
#include <cctorch/low_rank.h>
#include <gtest/gtest.h>

namespace cctorch {
namespace {

TEST(LowRank, EqualsTheMergedWeight) {
  const auto first = at::randn({2, 3, 3, 3}, at::kDouble);
  const auto second = at::randn({4, 2, 1, 1}, at::kDouble);
  const auto bias = at::randn({4}, at::kDouble);
  const auto x = at::randn({1, 3, 8, 8}, at::kDouble);
  const auto merged = at::einsum("nr,rchw->nchw", {second.flatten(1), first});
  const auto y = low_rank_conv2d(x, first, second, bias, {2, 1}, {1, 0}, {1, 2});
  EXPECT_TRUE(y.allclose(at::conv2d(x, merged, bias, {2, 1}, {1, 0}, {1, 2}), 1e-11, 1e-11));

  const auto rows = at::randn({50, 27}, at::kDouble);
  const auto flat = low_rank_linear(rows, first.flatten(1), second.flatten(1), bias);
  EXPECT_TRUE(flat.allclose(at::linear(rows, merged.flatten(1), bias), 1e-11, 1e-11));
}

}  // namespace
}  // namespace cctorch
