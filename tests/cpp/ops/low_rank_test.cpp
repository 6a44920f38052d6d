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

TEST(LowRank, FactorsOfManyAreNearest) {
  const std::vector<at::Tensor> matrices{at::randn({100, 150}), at::randn({90, 70}), at::randn({4, 8, 6})};
  const auto [left, right] = truncated_svd(matrices, {10, 12, 2});
  for (size_t i = 0; i < matrices.size(); ++i) {
    const at::Tensor values = at::linalg_svdvals(matrices[i].to(at::kDouble));
    const int64_t rank = left[i].size(-1);
    const double best = values.narrow(-1, rank, values.size(-1) - rank).norm().item<double>();
    EXPECT_LE((at::matmul(left[i], right[i]) - matrices[i]).norm().item<double>(), 1.001 * best);
  }
}

TEST(LowRank, Tucker2AtFullRanksIsTheWeight) {
  std::vector<at::Tensor> weights{at::randn({6, 4, 3, 3})};
  for (int i = 0; i < 8; ++i) weights.push_back(at::randn({70, 80}));
  std::vector<int64_t> ranks_out, ranks_in;
  for (const at::Tensor& weight : weights) {
    ranks_out.push_back(weight.size(0));
    ranks_in.push_back(weight.size(1));
  }
  const auto [cores, out, in] = tucker2(weights, ranks_out, ranks_in, 1);
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor narrow = at::matmul(in[i], cores[i].reshape({cores[i].size(0), cores[i].size(1), -1})).flatten(1);
    EXPECT_TRUE(at::mm(out[i], narrow).view(weights[i].sizes()).allclose(weights[i], 1e-4, 1e-4));
  }
}

}  // namespace
}  // namespace cctorch
