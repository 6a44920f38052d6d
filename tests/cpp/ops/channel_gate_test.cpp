#include <ATen/ATen.h>
#include <cctorch/channel_gate.h>
#include <gtest/gtest.h>

namespace cctorch {
namespace {

TEST(ChannelGate, EqualsABroadcastProductWithItsGradients) {
  for (const auto format : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
    const auto x = at::randn({3, 5, 9, 9}, at::kDouble).contiguous(format).requires_grad_();
    const auto gate = at::randn({5}, at::kDouble).requires_grad_();
    const auto y = channel_gate(x, gate);
    EXPECT_TRUE(y.is_contiguous(format));
    EXPECT_TRUE(y.equal(x * gate.view({1, 5, 1, 1})));
    (y * y).sum().backward();
    EXPECT_TRUE(x.grad().allclose(2 * x * gate.square().view({1, 5, 1, 1}), 1e-12, 1e-12));
    EXPECT_TRUE(gate.grad().allclose(2 * gate * x.square().sum({0, 2, 3}), 1e-12, 1e-12));
  }
}

}  // namespace
}  // namespace cctorch
