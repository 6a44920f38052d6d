#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <cctorch/batch_norm.h>
#include <gtest/gtest.h>

namespace cctorch {
namespace {

TEST(BatchNorm, IsATensWithItsGradients) {
  for (const auto format : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
    const auto x = (3 * at::randn({3, 7, 9, 8}, at::kDouble) + 2).contiguous(format).requires_grad_();
    const auto weight = at::randn({7}, at::kDouble).requires_grad_();
    const auto bias = at::randn({7}, at::kDouble).requires_grad_();
    const auto grad = at::randn({3, 7, 9, 8}, at::kDouble);
    const auto expected = at::batch_norm(x, weight, bias, {}, {}, true, 0.0, 1e-5, false);
    (expected * grad).sum().backward();
    const std::vector<at::Tensor> gradients = {x.grad().clone(), weight.grad().clone(), bias.grad().clone()};
    for (const auto& tensor : {x, weight, bias}) tensor.mutable_grad() = at::Tensor();

    const auto [y, mean, inverse_deviation] = batch_norm(x, weight, bias, 1e-5);
    EXPECT_TRUE(y.is_contiguous(format));
    EXPECT_TRUE(y.allclose(expected, 1e-12, 1e-12));
    (y * grad).sum().backward();
    EXPECT_TRUE(x.grad().allclose(gradients[0], 1e-10, 1e-12));
    EXPECT_TRUE(weight.grad().allclose(gradients[1], 1e-10, 1e-12));
    EXPECT_TRUE(bias.grad().allclose(gradients[2], 1e-10, 1e-12));

    const c10::NoGradGuard no_grad;
    const auto var = inverse_deviation.pow(-2) - 1e-5;
    EXPECT_TRUE(batch_norm_inference(x, weight, bias, mean, var, 1e-5).allclose(y, 1e-9, 1e-9));
  }
}

}  // namespace
}  // namespace cctorch
