#include <ATen/ATen.h>
#include <cctorch/cctorch.h>
#include <gtest/gtest.h>

#include <set>

#include "csrc/ops/rows.h"

namespace cctorch {
namespace {

std::vector<at::Tensor> weights() {
  return {at::randn({4, 3, 5, 5}, at::kDouble).contiguous(at::MemoryFormat::ChannelsLast),
          at::randn({3, 700}, at::kDouble), at::randn({2, 1}, at::kDouble)};
}

std::vector<at::Tensor> filters_of(const std::vector<at::Tensor>& xs, double value) {
  std::vector<at::Tensor> result;
  for (const auto& x : xs) result.push_back(at::full({x.size(0)}, value, at::kDouble));
  return result;
}

at::Tensor along_filters(const at::Tensor& parameter, const at::Tensor& x) {
  std::vector<int64_t> shape(x.dim(), 1);
  shape[0] = -1;
  return parameter.view(shape);
}

// The scalar definition, of all of a tensor.
at::Tensor rounded(const at::Tensor& x, double scale) { return (x / scale).round().clamp(-4, 3) * scale; }

TEST(Lists, FakeQuantEqualsTheDefinition) {
  const auto xs = weights();
  const auto ys = fake_quant(xs, filters_of(xs, std::log(0.5)), -4, 3, 0);
  ASSERT_EQ(ys.size(), xs.size());
  for (size_t i = 0; i < xs.size(); ++i) {
    EXPECT_TRUE(at::allclose(ys[i], rounded(xs[i], 0.5)));
    EXPECT_EQ(ys[i].strides(), xs[i].strides());
  }
  const auto around = fake_quant_offset(xs, filters_of(xs, std::log(0.5)), filters_of(xs, 0.125), -4, 3, 0);
  for (size_t i = 0; i < xs.size(); ++i) {
    EXPECT_TRUE(at::allclose(around[i], rounded(xs[i] - 0.125, 0.5) + 0.125));
  }
}

TEST(Lists, FakeQuantDifferentiates) {
  std::vector<at::Tensor> xs{at::tensor({-9.0f, -0.25f, 0.75f, 5.0f}).requires_grad_(),
                             at::tensor({{0.25f}, {7.0f}}).requires_grad_()};
  std::vector<at::Tensor> scales{at::zeros({1}).requires_grad_(), at::zeros({1}).requires_grad_()};
  const auto ys = fake_quant(xs, scales, -4, 3, std::nullopt, {0.5, 2.0});
  (ys[0].sum() + ys[1].sum()).backward();
  EXPECT_TRUE(xs[0].grad().equal(at::tensor({0.0f, 1.0f, 1.0f, 0.0f})));
  EXPECT_TRUE(xs[1].grad().equal(at::tensor({{1.0f}, {0.0f}})));
  EXPECT_FLOAT_EQ(scales[0].grad().item<float>(), 0.5f * (-4.0f + 0.25f + 0.25f + 3.0f));
  EXPECT_FLOAT_EQ(scales[1].grad().item<float>(), 2.0f * (-0.25f + 3.0f));
}

TEST(Lists, SoftThresholdEqualsTheDefinition) {
  auto xs = weights();
  for (auto& x : xs) x.requires_grad_();
  const auto thresholds = filters_of(xs, 0.5);
  const auto ys = soft_threshold(xs, thresholds, 0);
  ys[1].sum().backward();
  EXPECT_FALSE(xs[0].grad().defined());
  EXPECT_TRUE(xs[1].grad().equal((xs[1].abs() > 0.5).to(at::kDouble)));
  for (size_t i = 0; i < xs.size(); ++i) {
    const auto expected = xs[i].sign() * (xs[i].abs() - along_filters(thresholds[i], xs[i])).relu();
    EXPECT_TRUE(at::allclose(ys[i], expected));
  }
}

TEST(Lists, OtherGridsAreThoseOfEachTensor) {
  const auto xs = weights();
  const auto scales = filters_of(xs, 0);
  const auto floats = fp8_quant(xs, scales, at::kFloat8_e5m2, 0);
  const auto powers = power_of_two_quant(xs, 3, 0);
  const auto signs = binary_quant(xs, 0);
  const auto ternary = ternary_quant(xs, 0);
  const auto codes = binary_code_quant(xs, 1, "greedy", 0);
  for (size_t i = 0; i < xs.size(); ++i) {
    EXPECT_TRUE(floats[i].equal(xs[i].to(at::kFloat8_e5m2).to(at::kDouble)));
    EXPECT_TRUE(powers[i].equal(power_of_two_quant(xs[i], 3, 0)));
    EXPECT_TRUE(at::allclose(signs[i].abs().flatten(1).select(1, 0), xs[i].abs().flatten(1).mean(1)));
    EXPECT_TRUE(ternary[i].equal(ternary_quant(xs[i], 0)));
    EXPECT_TRUE(at::allclose(codes[i], signs[i]));
  }
}

// What a GPU does with the grids that are computed from the weights.
TEST(Lists, RowsOfOneWidthGoInOneCall) {
  auto xs = weights();
  xs.push_back(at::randn({5, 700}, at::kDouble));
  xs.push_back(at::empty({0, 3}, at::kDouble));
  for (const std::optional<int64_t> axis :
       {std::optional<int64_t>(), std::optional<int64_t>(0), std::optional<int64_t>(-1)}) {
    std::vector<int64_t> widths;
    const auto ys = map_rows(xs, axis, [&](const at::Tensor& rows) {
      widths.push_back(rows.size(1));
      return rows / rows.abs().sum(1, /*keepdim=*/true);
    });
    EXPECT_EQ(std::set<int64_t>(widths.begin(), widths.end()).size(), widths.size());
    ASSERT_EQ(ys.size(), xs.size());
    for (size_t i = 0; i < xs.size(); ++i) {
      std::vector<int64_t> others;
      for (int64_t dim = 0; dim < xs[i].dim(); ++dim) {
        if (!axis || dim != (*axis + xs[i].dim()) % xs[i].dim()) others.push_back(dim);
      }
      EXPECT_TRUE(at::allclose(ys[i], xs[i] / xs[i].abs().sum(others, /*keepdim=*/true)));
      EXPECT_EQ(ys[i].strides(), at::empty_like(xs[i]).strides());
    }
  }
}

TEST(Lists, NameABadTensor) {
  const auto x = at::zeros({2, 3}), scale = at::zeros({1});
  try {
    fake_quant({x, x}, {scale, at::zeros({2})}, -4, 3);
    FAIL();
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what()).find("log_scale[1] must have one element"), std::string::npos);
  }
  EXPECT_TRUE(fake_quant(at::TensorList(), at::TensorList(), -4, 3).empty());
}

}  // namespace
}  // namespace cctorch
