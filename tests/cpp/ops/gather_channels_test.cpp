#include <cctorch/gather_channels.h>
#include <gtest/gtest.h>
#include <torch/types.h>

namespace cctorch {
namespace {

TEST(GatherChannels, KeepsChannelsLastAndItsDerivative) {
  const at::Tensor index = torch::tensor({5, 0, 3}, torch::kLong);
  const at::Tensor x =
      torch::randn({2, 6, 4, 3}, torch::kDouble).contiguous(at::MemoryFormat::ChannelsLast).requires_grad_();
  const at::Tensor y = gather_channels(x, index);
  EXPECT_TRUE(torch::equal(y, x.index_select(1, index)));
  EXPECT_TRUE(y.is_contiguous(at::MemoryFormat::ChannelsLast));
  const at::Tensor grad = torch::randn_like(y);
  y.backward(grad);
  EXPECT_TRUE(torch::equal(x.grad(), torch::zeros_like(x).index_add(1, index, grad)));
  EXPECT_TRUE(x.grad().is_contiguous(at::MemoryFormat::ChannelsLast));
}

TEST(ScatterChannels, AddsUpWhatWasPickedTwice) {
  const at::Tensor y = torch::tensor({{1.0, 2.0, 4.0}});
  const at::Tensor x = scatter_channels(y, torch::tensor({1, 1, 3}, torch::kLong), 1, 5);
  EXPECT_TRUE(torch::equal(x, torch::tensor({{0.0, 3.0, 0.0, 4.0, 0.0}})));
}

}  // namespace
}  // namespace cctorch
