#include "csrc/ops/cpu/simd/uniform_grid.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <tuple>

#include "csrc/ops/cpu/channelwise.h"
#include "csrc/regularize/uniform_grid.h"

namespace cctorch::regularize {
namespace {

simd::UniformGrid loops(Isa wanted, at::ScalarType type) {
  const auto storage = channelwise::storage(type);
  if (wanted == Isa::kAvx512) return simd::avx512::uniform_grid(storage);
  return wanted == Isa::kAvx2 ? simd::avx2::uniform_grid(storage) : simd::baseline::uniform_grid(storage);
}

at::Tensor errors(const at::Tensor& levels, const at::Tensor& rows) {
  return (levels.to(at::kDouble) - rows.to(at::kDouble)).square().sum(-1);
}

using Case = std::tuple<Isa, at::ScalarType, int, bool>;

class UniformGridTest : public testing::TestWithParam<Case> {};

// The loops against the same search composed of ATen operators, on rows of a tile and a bit, with zeros and outliers.
TEST_P(UniformGridTest, LoopsAreTheComposedSearch) {
  const auto [wanted, type, q, search] = GetParam();
  if (wanted > isa()) GTEST_SKIP() << "this processor has not these instructions";
  at::manual_seed(4);
  at::Tensor rows = at::randn({12, 700}, at::kDouble);
  rows[0].zero_();
  rows[1].narrow(0, 3, 690).zero_();
  rows[2][7] = 40;
  rows[3].mul_(1e-6);
  rows[4].copy_(rows[4].mul(2).round_().clamp_(-q, q).mul_(0.25));  // on a grid already
  rows = rows.to(type);
  const at::Tensor expected =
      on_uniform_grid(rows.to(at::kDouble), type, q, search ? Range::mse : Range::absmax).to(type);
  const at::Tensor found = at::empty_like(rows);
  for (int64_t i = 0; i < rows.size(0); ++i) {
    loops(wanted, type)(rows[i].const_data_ptr(), found[i].mutable_data_ptr(), rows.size(1), q, search);
  }
  const at::Tensor theirs = errors(expected, rows), ours = errors(found, rows);
  EXPECT_TRUE(at::allclose(ours, theirs, /*rtol=*/1e-6, /*atol=*/0)) << ours << theirs;
  // But for what lies halfway between two levels; in float64 the sums' order shows.
  const at::Tensor same = (found - expected).abs() <= 1e-9 * expected.abs();
  EXPECT_GT(same.to(at::kDouble).mean().item<double>(), 0.999);
}

INSTANTIATE_TEST_SUITE_P(Types, UniformGridTest,
                         testing::Combine(testing::Values(Isa::kBaseline, Isa::kAvx2, Isa::kAvx512),
                                          testing::Values(at::kFloat, at::kDouble, at::kHalf, at::kBFloat16),
                                          testing::Values(3, 7, 127), testing::Bool()));

}  // namespace
}  // namespace cctorch::regularize
