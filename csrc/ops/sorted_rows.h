#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace cctorch {

// Rows sorted in ascending order, with running sums: what falls between two bounds costs a binary search.
class SortedRows {
 public:
  explicit SortedRows(const at::Tensor& rows);
  SortedRows(at::Tensor values, at::Tensor sums) : values_(std::move(values)), sums_(std::move(sums)) {}

  const at::Tensor& values() const { return values_; }
  // rows x (columns + 1): from 0 on
  const at::Tensor& sums() const { return sums_; }

  // Elements of each row in each of the cells that `bounds` (rows x cells - 1, ascending) cut it into, and their sums.
  struct Cells {
    at::Tensor counts, sums;  // rows x cells, float64
  };
  Cells cells(const at::Tensor& bounds) const;

 private:
  at::Tensor values_, sums_;
};

// Halfway between neighbours in the last dimension.
at::Tensor midpoints(const at::Tensor& levels);

// For each element of `rows` the nearest of its row's ascending `levels`; the lower one of two as near.
at::Tensor nearest(const at::Tensor& rows, const at::Tensor& levels);

}  // namespace cctorch
