#include <ATen/ATen.h>
#include <cctorch/float_quant.h>
#include <cctorch/quant_range.h>
#include <cctorch/value_grid.h>
#include <gtest/gtest.h>

#include <limits>

#include "csrc/ops/value_grid.h"

namespace cctorch {
namespace {

TEST(FloatQuant, EqualsTheConversion) {
  const auto x = (at::randn({1000}) * 100).clamp(-448, 448);
  const auto scale = at::zeros({1});
  for (const auto type : {at::kFloat8_e4m3fn, at::kFloat8_e5m2}) {
    EXPECT_TRUE(fp8_quant(x, scale, type).equal(x.to(type).to(at::kFloat)));
  }
  EXPECT_TRUE(
      power_of_two_quant(at::tensor({1.0f, -0.7f, 0.3f, 0.05f}), 3).equal(at::tensor({1.0f, -0.5f, 0.25f, 0.0f})));
}

TEST(ValueGrid, FindsTheValues) {
  const auto x = at::tensor({4.0f, -2.0f, 0.5f, -0.25f});
  EXPECT_TRUE(ternary_quant(x).equal(at::tensor({3.0f, -3.0f, 0.0f, 0.0f})));
  EXPECT_TRUE(binary_quant(x).equal(binary_code_quant(x, 1)));
  const auto two = at::tensor({1.0f, 1.2f, -3.0f, 3.0f});
  EXPECT_TRUE(at::allclose(binary_code_quant(two, 2), at::tensor({1.1f, 1.1f, -3.0f, 3.0f})));
  EXPECT_TRUE(at::allclose(binary_code_quant(two, 1, "greedy"), at::tensor({2.05f, 2.05f, -2.05f, 2.05f})));
}

TEST(ValueGrid, SumsOfMembersAreThoseOfAllCopies) {
  const auto values = at::arange(1000, at::kDouble), members = at::arange(1000, at::kLong).square().remainder(5);
  const auto expected = at::bincount(members, values, 6);
  for (const int64_t copies : {1, 4, 1024}) EXPECT_TRUE(sums_of_members(values, members, 6, copies).equal(expected));
}

TEST(ValueGrid, CodebookLearns) {
  const auto x = at::tensor({0.0f, 2.0f, 9.0f, 11.0f}).requires_grad_();
  const auto codebook = at::tensor({8.0f, 3.0f, 90.0f}).requires_grad_();
  EXPECT_TRUE(codebook_update(x, codebook).equal(at::tensor({10.0f, 1.0f, 90.0f})));
  EXPECT_TRUE(codebook_indices(x, codebook).equal(at::tensor({1, 1, 0, 0}, at::kLong)));
  codebook_quant(x, codebook).sum().backward();
  EXPECT_TRUE(codebook.grad().equal(at::tensor({2.0f, 2.0f, 0.0f})));
  EXPECT_TRUE(x.grad().equal(at::ones({4})));
}

TEST(QuantRange, FindsAndFollows) {
  const auto x = at::tensor({1.0f, 2.0f, 4.0f});
  const auto [log_scale, offset] = quant_range_offset(x, 0, 3);
  EXPECT_FLOAT_EQ(log_scale.item<float>(), 0);
  EXPECT_FLOAT_EQ(offset.item<float>(), 1);
  EXPECT_FLOAT_EQ(quant_range(x, -8, 7).exp().item<float>(), 4.0f / 7);
  EXPECT_LE(quant_range(x, -8, 7, std::nullopt, "mse").item<float>(), quant_range(x, -8, 7).item<float>());
  auto low = at::full({1}, std::numeric_limits<float>::infinity()), high = -low;
  observe_range_(low, high, x);
  observe_range_(low, high, x * 2, 0.5);
  EXPECT_FLOAT_EQ(low.item<float>(), 1.5);
  EXPECT_FLOAT_EQ(high.item<float>(), 6);
}

}  // namespace
}  // namespace cctorch
