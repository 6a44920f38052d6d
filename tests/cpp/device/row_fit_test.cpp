#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "csrc/ops/row_fits.h"
#include "tests/cpp/device/launch.h"

#include "kernels/row_fit.cuh"

namespace cctorch::device {
namespace {

constexpr uint32_t kSeeds[] = {0, 1, 7};

// Random, constant, with ties, far apart, on a grid already, of three scales already, and zero.
at::Tensor examples(int64_t columns) {
  at::manual_seed(7);
  at::Tensor rows = at::randn({9, columns}, at::kDouble);
  rows[1].fill_(-0.25);
  rows[2].mul_(2).round_();
  rows[3].mul_(1e-30);
  rows[4].mul_(at::randn({columns}, at::kDouble).mul_(3).exp_());
  rows[5].copy_(rows[5].mul(2).round_().clamp_(-7, 7).mul_(0.25));
  rows[6].copy_(at::where(rows[6].abs() > 0.5, 0.75, 0.25) * rows[6].sign());
  rows[7].zero_();
  return rows;
}

const double* from(const at::Tensor& tensor) { return tensor.const_data_ptr<double>(); }

cuda::row_fit::SortedRows rows_of(const SortedRows& sorted) {
  return {from(sorted.values()), from(sorted.sums()), sorted.values().size(-1)};
}

// Squared errors of rows on their nearest of the ascending `levels`.
at::Tensor errors(const at::Tensor& rows, const at::Tensor& levels) {
  return (nearest(rows, levels) - rows).square().sum(-1);
}

bool equal_errors(const at::Tensor& ours, const at::Tensor& theirs, const at::Tensor& rows) {
  return ((ours - theirs).abs() <= 1e-9 * theirs + 1e-28 * rows.square().sum(-1)).all().item<bool>();
}

TEST(RowFitOnDevice, SearchesTheReachAsComposed) {
  for (const int64_t columns : {1, 2, 300}) {
    for (const double q : {3.0, 127.0}) {
      const at::Tensor rows = examples(columns), expected = composed::searched_reach(rows, q);
      for (const uint32_t seed : kSeeds) {
        const at::Tensor reach = at::full_like(expected, NAN);
        cuda::row_fit::SearchReach kernel{
            from(rows), reach.mutable_data_ptr<double>(), columns, q, row_fits::kRefinements, row_fits::kClips, {}};
        for (int k = 0; k < row_fits::kClips; ++k) kernel.clip[k] = std::pow(row_fits::kClipRatio, k + 1);
        Launch{seed}(rows.size(0), kernel);
        const auto error = [&](const at::Tensor& r) {
          const at::Tensor code = (rows / at::where(r > 0, r, 1.0) * q).round().clamp(-q, q);
          return (code / q * r - rows).square().sum(-1);
        };
        EXPECT_TRUE(equal_errors(error(reach), error(expected), rows)) << columns << ' ' << q << reach << expected;
      }
    }
  }
}

TEST(RowFitOnDevice, IteratesLloydAsComposed) {
  for (const int64_t columns : {1, 300}) {
    for (const int64_t count : {2, 256}) {
      const at::Tensor rows = examples(columns);
      const SortedRows sorted(rows);
      const at::Tensor even = at::linspace(-3, 3, count, at::kDouble).expand({rows.size(0), count});
      const at::Tensor centers = at::stack({even, even / 3 + 0.1, even * 1e-29}, 1);
      const at::Tensor expected = composed::lloyd(sorted.values(), sorted.sums(), centers);
      EXPECT_FALSE(expected.equal(centers));
      for (const uint32_t seed : kSeeds) {
        at::Tensor levels = centers.clone();
        Launch{seed}(rows.size(0) * 3, cuda::row_fit::Lloyd{rows_of(sorted), levels.mutable_data_ptr<double>(), 3,
                                                            count, row_fits::kIterations});
        EXPECT_TRUE(levels.equal(expected)) << columns << ' ' << count;
      }
    }
  }
}

at::Tensor levels_of(const at::Tensor& scales) {
  return std::get<0>(at::sort(at::matmul(scales, all_codes(3, scales.options()).t())));
}

at::Tensor alternated_on_device(const SortedRows& sorted, const at::Tensor& scales, uint32_t seed) {
  const at::Tensor fitted = scales.clone();
  Launch{seed}(2, cuda::row_fit::Alternate{rows_of(sorted), fitted.mutable_data_ptr<double>(), scales.size(0),
                                           row_fits::kTurns});
  return fitted;
}

TEST(RowFitOnDevice, AlternatesThreeCodesAsComposed) {
  for (const int64_t columns : {1, 2, 9, 160, 700}) {
    const at::Tensor rows = examples(columns);
    const SortedRows sorted(rows);
    const at::Tensor scales = rows.abs().mean(-1, true) * at::tensor({1.0, 0.5, 0.2}, at::kDouble);
    const at::Tensor theirs = errors(rows, levels_of(composed::alternated(sorted.values(), sorted.sums(), scales)));
    for (const uint32_t seed : kSeeds) {
      const at::Tensor ours = errors(rows, levels_of(alternated_on_device(sorted, scales, seed)));
      EXPECT_TRUE(equal_errors(ours, theirs, rows)) << columns << ours << theirs;
    }
  }
}

// Where levels are equal, rounding decides which of them is first; but no turn is for the worse.
TEST(RowFitOnDevice, AlternatesFromEqualLevels) {
  for (const int64_t columns : {1, 9, 700}) {
    const at::Tensor rows = examples(columns);
    const SortedRows sorted(rows);
    for (const auto& start : std::vector<std::vector<double>>{{1, 0, 0.3}, {0.4, 0.4, 0.4}, {1, 0, 0}}) {
      const at::Tensor scales = rows.abs().mean(-1, true) * at::tensor(start, at::kDouble);
      const at::Tensor before = errors(rows, levels_of(scales));
      const at::Tensor after = errors(rows, levels_of(alternated_on_device(sorted, scales, 0)));
      const at::Tensor rounding = 1e-20 * rows.square().sum(-1);
      EXPECT_TRUE((after <= before * (1 + 1e-9) + rounding).all().item<bool>()) << columns << start << before << after;
    }
  }
}

TEST(LeastSquares, IsThatOfThePseudoinverse) {
  at::manual_seed(3);
  for (int64_t rank = 0; rank <= 3; ++rank) {
    const at::Tensor half = at::randn({3, rank}, at::kDouble), gram = at::matmul(half, half.t());
    const at::Tensor moment = at::randn({3}, at::kDouble);
    const at::Tensor expected = at::mv(at::linalg_pinv(gram, 1e-12, /*hermitian=*/true), moment);
    double g[3][3], m[3], x[3];
    for (int i = 0; i < 3; ++i) {
      m[i] = moment[i].item<double>();
      for (int j = 0; j < 3; ++j) g[i][j] = gram[i][j].item<double>();
    }
    formula::least_squares(g, m, x, 3);
    EXPECT_TRUE(at::tensor({x[0], x[1], x[2]}, at::kDouble).allclose(expected, 1e-9, 1e-12)) << rank << expected;
  }
}

}  // namespace
}  // namespace cctorch::device
