#include "csrc/regularize/prune.h"

#include <ATen/ATen.h>
#include <cctorch/mask.h>
#include <gtest/gtest.h>

#include <algorithm>

namespace cctorch::regularize {
namespace {

TEST(KeepBestSlices, KeepsWhatTheMaskOfEachWeightKeeps) {
  at::manual_seed(5);
  for (const auto type : {at::kFloat, at::kDouble, at::kHalf}) {
    const at::Tensor weights = at::randn({4, 12, 10, 3}, at::kDouble).to(type);
    weights[1].zero_();
    weights[2].copy_(weights[2].sign());  // all norms along outputs are equal
    weights[3][4][2][1] = 40;
    for (const int64_t axis : {0, 1, 2}) {
      for (const double sparsity : {0.0, 0.5, 1.0}) {
        const int64_t size = weights.size(axis + 1);
        const int64_t kept = std::max<int64_t>(1, static_cast<int64_t>((1 - sparsity) * static_cast<double>(size)));
        const at::Tensor found = keep_best_slices(weights, axis, kept);
        EXPECT_EQ(found.scalar_type(), type);
        for (int64_t i = 0; i < weights.size(0); ++i) {
          const at::Tensor mask = channel_masks({weights[i]}, sparsity, axis)[0];
          EXPECT_TRUE(found[i].equal(apply_mask(weights[i], mask))) << i << type << axis << sparsity;
        }
      }
    }
  }
}

}  // namespace
}  // namespace cctorch::regularize
