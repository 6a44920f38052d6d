#include <ATen/ATen.h>
#include <cctorch/fake_quant.h>
#include <gtest/gtest.h>

namespace cctorch {
namespace {

// Each level of the grid, from the scalar definition.
double expected(double x, double scale, double qmin, double qmax) {
  return scale * std::nearbyint(std::min(std::max(x / scale, qmin), qmax));
}

TEST(FakeQuant, EqualsTheDefinitionPerChannelInChannelsLast) {
  const auto x = at::randn({4, 3, 5, 5}, at::kDouble).contiguous(at::MemoryFormat::ChannelsLast);
  const auto log_scale = at::tensor({-1.0, -2.0, 0.5}, at::kDouble);
  const auto y = fake_quant(x, log_scale, -4, 3, 1);
  EXPECT_TRUE(y.is_contiguous(at::MemoryFormat::ChannelsLast));
  for (int64_t c = 0; c < 3; ++c) {
    const auto from = x.select(1, c).reshape(-1);
    const auto to = y.select(1, c).reshape(-1);
    const double scale = std::exp(log_scale[c].item<double>());
    for (int64_t i = 0; i < from.numel(); ++i) {
      EXPECT_DOUBLE_EQ(to[i].item<double>(), expected(from[i].item<double>(), scale, -4, 3));
    }
  }
}

TEST(FakeQuant, Differentiates) {
  const auto x = at::tensor({-9.0f, -0.25f, 0.75f, 5.0f}).requires_grad_();
  const auto log_scale = at::zeros({1}).requires_grad_();
  fake_quant(x, log_scale, -4, 3, std::nullopt, 0.5).sum().backward();
  EXPECT_TRUE(x.grad().equal(at::tensor({0.0f, 1.0f, 1.0f, 0.0f})));
  // round(v) - v inside, the end of the grid outside
  EXPECT_FLOAT_EQ(log_scale.grad().item<float>(), 0.5f * (-4.0f + 0.25f + 0.25f + 3.0f));
}

TEST(FakeQuant, WithAnOffsetIsTheGridAroundIt) {
  const auto x = at::tensor({-9.0, -0.3, 0.8, 5.0}, at::kDouble).requires_grad_();
  const auto log_scale = at::zeros({1}, at::kDouble).requires_grad_();
  const auto offset = at::full({1}, 0.5, at::kDouble).requires_grad_();
  const auto y = fake_quant_offset(x, log_scale, offset, -4, 3);
  for (int64_t i = 0; i < 4; ++i) {
    EXPECT_DOUBLE_EQ(y[i].item<double>(), expected(x[i].item<double>() - 0.5, 1, -4, 3) + 0.5);
  }
  y.sum().backward();
  EXPECT_TRUE(x.grad().equal(at::tensor({0.0, 1.0, 1.0, 0.0}, at::kDouble)));
  EXPECT_DOUBLE_EQ(offset.grad().item<double>(), 2);
  EXPECT_DOUBLE_EQ(log_scale.grad().item<double>(), -4 + (-1 + 0.8) + (0 - 0.3) + 3);
}

TEST(FakeQuant, GroupsHaveScalesOfTheirOwn) {
  const auto x = at::randn({2, 6}, at::kDouble);
  const auto log_scale = at::randn({2, 3}, at::kDouble);
  const auto y = fake_quant_groups(x, log_scale, -4, 3, 2);
  for (int64_t i = 0; i < 12; ++i) {
    const double scale = std::exp(log_scale.view(-1)[i / 2].item<double>());
    EXPECT_DOUBLE_EQ(y.view(-1)[i].item<double>(), expected(x.view(-1)[i].item<double>(), scale, -4, 3));
  }
}

TEST(Pact, ClipsAndLearnsTheLevel) {
  const auto x = at::tensor({-1.0, 0.4, 1.4, 5.0}, at::kDouble).requires_grad_();
  const auto log_alpha = at::full({1}, std::log(3.0), at::kDouble).requires_grad_();
  const auto y = pact(x, log_alpha, 2);
  EXPECT_TRUE(at::allclose(y, at::tensor({0.0, 0.0, 1.0, 3.0}, at::kDouble)));
  y.sum().backward();
  EXPECT_TRUE(x.grad().equal(at::tensor({0.0, 1.0, 1.0, 0.0}, at::kDouble)));
  EXPECT_DOUBLE_EQ(log_alpha.grad().item<double>(), 3);
}

TEST(FakeQuant, NamesABadArgument) {
  try {
    fake_quant(at::zeros({2, 3}), at::zeros({2}), -4, 3, 1);
    FAIL();
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what()).find("log_scale must have one element for each"), std::string::npos);
  }
}

}  // namespace
}  // namespace cctorch
