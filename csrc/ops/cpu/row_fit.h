#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "csrc/ops/cpu/magnitude_split.h"
#include "csrc/ops/cpu/sorted_row.h"

namespace cctorch::cpu {

// The values that a row is best quantized to: what csrc/ops/best_grids.h says, row by row in a thread's cache. Memory
// is used again for the next row.
class RowFit {
 public:
  // The a of the best -a, 0, a.
  double ternary_reach(const double* row, int64_t n);

  // Replaces the row by its best sum of so many scaled codes. With a `precision`, that of the type which the row comes
  // from, one that is such a sum already stays.
  void binary_code(double* row, int64_t n, int64_t bits, std::optional<double> precision = std::nullopt);

  // Replaces the row by such a sum in which each code is the best of what the ones before leave.
  void greedy_code(double* row, int64_t n, int64_t bits);

  // Replaces the row by the nearest of its `count` values, a power of 2, that Lloyd's algorithm finds from evenly
  // spaced values or from quantiles, whichever ends better. A row of so few values stays.
  void codebook(double* row, int64_t n, int64_t count);

 private:
  // Of the sorted row up to `end`, from where the one before ends: what is nearest to the level of `code`.
  struct Cell {
    size_t code;
    int64_t end;
    bool operator==(const Cell&) const = default;
  };

  static bool is_code(const double* row, int64_t n, int64_t bits, double precision);
  void fit_scales(const double* row, int64_t n, int64_t bits);
  double mean_rest(const double* row, int64_t n);
  void cut();
  void alternate();
  double lloyd();
  void replace_by_nearest(double* row, int64_t n);

  MagnitudeSplit split_;
  SortedRow sorted_;
  std::vector<double> left_, scales_, levels_, bounds_, best_;
  std::vector<Cell> cells_, before_;
};

}  // namespace cctorch::cpu
