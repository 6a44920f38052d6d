#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "csrc/ops/cpu/simd/magnitudes.h"
#include "csrc/ops/cpu/sorted_row.h"

namespace cctorch::cpu {

// Numbers of one storage type.
struct RowOf {
  const void* data;
  int64_t size;
  simd::Storage storage;
};

// The sign of x (that of 0 is positive) times `high` where |x| > bound, times `low` elsewhere.
struct SignedLevels {
  double bound, high, low;
};

// Of one magnitude: the mean.
SignedLevels scaled_signs(const RowOf& row);

// The row on the levels, to `to`, which is of its storage type.
void replace(const RowOf& row, void* to, const SignedLevels& levels,
             simd::Stores stores = simd::Stores::kThroughCaches);

// How many of the largest magnitudes of a row to set apart from the others so that the gain is largest, exactly but for
// the rounding of sums in float64, and the fewest of several as good.
//
// S(k), the sum of the k largest, is concave: between two k for which it is known it is below the lines through both
// whose slopes are the magnitudes there. The gain grows with S and is convex along a line, so it is nowhere larger than
// at the ends and where the lines meet. A few passes over the row, of 8 thresholds each, leave of it only what that
// does not rule out. Memory is used again for the next row. A row that is not finite has the levels NaN.
class MagnitudeSplit {
 public:
  // -a, 0, a: the gain is S^2 / k.
  SignedLevels ternary(const RowOf& row);

  // The gain is S^2 / k + (sum - S)^2 / (n - k).
  SignedLevels two_magnitudes(const RowOf& row);

 private:
  // A threshold, and how many are above it with which sum.
  struct Edge {
    double at;
    simd::Tail above;
  };
  struct Interval {
    Edge low, high;
  };
  struct Split {
    simd::Tail above;
    double below;  // sum
  };
  using Ratios = std::array<double, simd::kTails>;

  static simd::Tail crossing(const Edge& low, const Edge& high);
  template <typename Gain>
  Split best(const RowOf& row, const simd::Magnitudes& all, const Ratios& to_mean, const Gain& gain);
  template <typename Gain>
  Interval narrowed(const RowOf& row, const Interval& interval, const Ratios& thresholds, double margin,
                    const Gain& gain) const;
  template <typename Gain>
  Split best_inside(const simd::Outside& outside, const Gain& gain);
  template <typename Gain>
  Split best_sorted(const simd::Outside& outside, const Gain& gain);
  void cut(const RowOf& row, double low, double high, simd::Outside& outside);

  std::vector<double> inside_;  // the first found_ of them
  int64_t found_ = 0;
  std::vector<std::vector<double>> parts_;
  SortedRow sorted_;
};

}  // namespace cctorch::cpu
