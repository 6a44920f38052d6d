#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace cctorch::cpu {

// A row in ascending order with its running sums: what falls between two bounds costs a binary search. Its memory is
// used again for the next row.
class SortedRow {
 public:
  void sort(const double* row, int64_t n);

  int64_t size() const { return static_cast<int64_t>(values_.size()); }
  double operator[](int64_t i) const { return values_[i]; }
  double sum(int64_t begin, int64_t end) const { return sums_[end] - sums_[begin]; }
  // How many are at most `bound`.
  int64_t up_to(double bound) const {
    return std::upper_bound(values_.begin(), values_.end(), bound) - values_.begin();
  }

 private:
  void sort_keys();
  void add_up();

  std::vector<double> values_, sums_;
  std::vector<uint64_t> keys_, spare_;
};

}  // namespace cctorch::cpu
