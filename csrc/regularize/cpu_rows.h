#pragma once

#include <cctorch/regularize.h>

#include <functional>

#include "csrc/ops/cpu/row_fit.h"

namespace cctorch::regularize {

// One row of one weight, before and after.
struct Row {
  const void* from;
  void* to;
  int64_t size;
  at::ScalarType type;
};

// Replaces every weight, on CPU, row by row and on all threads; a row is a slice of dimension 0 or all of the weight.
void replace_cpu_rows(std::vector<Weight>& weights, bool per_channel,
                      const std::function<void(const Row& row)>& project);

// The same in float64: `project` changes the `size` numbers at `row`, and may use a thread's `fit`.
using ProjectRow = std::function<void(cpu::RowFit& fit, double* row, int64_t size, at::ScalarType type)>;
void replace_cpu_rows_in_float64(std::vector<Weight>& weights, bool per_channel, const ProjectRow& project);

}  // namespace cctorch::regularize
