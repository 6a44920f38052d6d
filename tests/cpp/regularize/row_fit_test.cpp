#include "csrc/ops/cpu/row_fit.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "csrc/ops/best_grids.h"
#include "csrc/regularize/value_sets.h"

namespace cctorch::regularize {
namespace {

at::Tensor errors(const at::Tensor& levels, const at::Tensor& rows) { return (levels - rows).square().sum(-1); }

// Equal errors, but for rounding of the values: where two fits are as good, either may come out.
bool as_good(const at::Tensor& found, const at::Tensor& expected, const at::Tensor& rows) {
  const at::Tensor ours = errors(found, rows), theirs = errors(expected, rows), energy = rows.square().sum(-1);
  return ((ours - theirs).abs() <= 1e-9 * theirs + 1e-28 * energy).all().item<bool>();
}

double* row_of(const at::Tensor& rows, int64_t i) { return rows[i].mutable_data_ptr<double>(); }

// Rows below and above the length from which digits are sorted, as float32 and as float64 make them: random, constant,
// with ties, far apart, codes of two scales already.
std::vector<at::Tensor> examples() {
  at::manual_seed(7);
  std::vector<at::Tensor> all;
  for (const int64_t columns : {1, 2, 9, 160, 161, 700}) {
    for (const auto type : {at::kFloat, at::kDouble}) {
      at::Tensor rows = at::randn({7, columns}, at::kDouble);
      rows[1].fill_(-0.25);
      rows[2].mul_(2).round_();
      rows[3].mul_(1e-30);
      rows[4].mul_(at::randn({columns}, at::kDouble).mul_(3).exp_());
      rows[5].copy_(at::where(rows[5].abs() > 0.5, 0.75, 0.25) * rows[5].sign());
      rows[6].zero_();
      all.push_back(rows.to(type).to(at::kDouble));
    }
  }
  return all;
}

TEST(SortedRow, IsAtSort) {
  cpu::SortedRow sorted;
  for (const at::Tensor& rows : examples()) {
    for (int64_t i = 0; i < rows.size(0); ++i) {
      const at::Tensor expected = std::get<0>(at::sort(rows[i])), sums = expected.cumsum(0);
      sorted.sort(row_of(rows, i), rows.size(1));
      ASSERT_EQ(sorted.size(), rows.size(1));
      for (int64_t k = 0; k < rows.size(1); ++k) {
        EXPECT_EQ(sorted[k], expected[k].item<double>());
        EXPECT_EQ(sorted.sum(0, k + 1), sums[k].item<double>());
        EXPECT_EQ(sorted.up_to(sorted[k]), (rows[i] <= sorted[k]).sum().item<int64_t>());
      }
    }
  }
}

TEST(SortedRow, InfinitiesAreAtTheEnds) {
  std::vector<double> row(200, 1.0);
  row[3] = -std::numeric_limits<double>::infinity();
  row[5] = std::numeric_limits<double>::infinity();
  row[7] = -0.0;
  cpu::SortedRow sorted;
  sorted.sort(row.data(), 200);
  EXPECT_EQ(sorted[0], row[3]);
  EXPECT_EQ(sorted[1], 0.0);
  EXPECT_EQ(sorted[199], row[5]);
}

TEST(RowFit, IsTheComposedTernary) {
  cpu::RowFit fit;
  for (const at::Tensor& rows : examples()) {
    const at::Tensor expected = composed::ternary_reach(rows);
    for (int64_t i = 0; i < rows.size(0); ++i) {
      EXPECT_NEAR(fit.ternary_reach(row_of(rows, i), rows.size(1)), expected[i].item<double>(),
                  1e-12 * expected[i].item<double>());
    }
  }
}

class RowFitBits : public testing::TestWithParam<int> {};

TEST_P(RowFitBits, CodesAreTheComposedOnes) {
  const int bits = GetParam();
  cpu::RowFit fit;
  for (const at::Tensor& rows : examples()) {
    if (bits > 2 && rows.size(1) == 1) continue;
    const at::Tensor expected = composed::fitted_code(rows, bits), found = rows.clone();
    for (int64_t i = 0; i < rows.size(0); ++i) fit.binary_code(row_of(found, i), rows.size(1), bits);
    EXPECT_TRUE(as_good(found, expected, rows)) << bits << " bits" << errors(found, rows) << errors(expected, rows);
  }
}

// As many as the regularizer has.
class RowFitFewBits : public testing::TestWithParam<int> {};

TEST_P(RowFitFewBits, CodesStay) {
  const int bits = GetParam();
  cpu::RowFit fit;
  for (const at::Tensor& rows : examples()) {
    at::Tensor found = rows.clone();
    for (int64_t i = 0; i < rows.size(0); ++i) fit.binary_code(row_of(found, i), rows.size(1), bits, 0x1p-52);
    const at::Tensor expected = as_binary_code(rows, bits, at::kDouble);
    EXPECT_TRUE(as_good(found, expected, rows)) << bits << " bits" << errors(found, rows) << errors(expected, rows);
    const at::Tensor once = found.clone();
    for (int64_t i = 0; i < rows.size(0); ++i) fit.binary_code(row_of(found, i), rows.size(1), bits, 0x1p-52);
    EXPECT_TRUE(at::equal(found, once)) << bits << " bits, " << rows.size(1) << " columns";
  }
}

TEST_P(RowFitBits, CodebooksAreTheComposedOnes) {
  const int64_t count = int64_t{1} << GetParam();
  cpu::RowFit fit;
  for (const at::Tensor& rows : examples()) {
    const at::Tensor expected = on_codebook(rows, count), found = rows.clone();
    for (int64_t i = 0; i < rows.size(0); ++i) fit.codebook(row_of(found, i), rows.size(1), count);
    EXPECT_TRUE(as_good(found, expected, rows)) << count << " values" << errors(found, rows) << errors(expected, rows);
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, RowFitBits, testing::Values(1, 2, 3, 4, 6));
INSTANTIATE_TEST_SUITE_P(Bits, RowFitFewBits, testing::Values(1, 2, 3));

TEST(BestGrids, ARowThatIsNotFiniteHasNone) {
  at::manual_seed(0);
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    at::Tensor rows = at::randn({2, 40}, at::kDouble);
    const at::Tensor reach = composed::ternary_reach(rows)[0], code = composed::fitted_code(rows, 2)[0];
    rows[1][7] = bad;
    EXPECT_TRUE(composed::ternary_reach(rows)[1].isnan().all().item<bool>());
    EXPECT_TRUE(composed::fitted_code(rows, 2)[1].isnan().all().item<bool>());
    EXPECT_TRUE(at::equal(composed::ternary_reach(rows)[0], reach));
    EXPECT_TRUE(at::equal(composed::fitted_code(rows, 2)[0], code));
  }
}

}  // namespace
}  // namespace cctorch::regularize
