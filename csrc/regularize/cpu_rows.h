#pragma once

#include <cctorch/regularizers.h>

#include <functional>

#include "csrc/ops/cpu/row_fit.h"

namespace cctorch::regularize {

// Replaces every weight, on CPU, row by row and on all threads; a row is a slice of dimension 0 or all of the weight.
// `project` changes the `size` numbers at `row`, and may use a thread's `fit`.
using ProjectRow = std::function<void(cpu::RowFit& fit, double* row, int64_t size, at::ScalarType type)>;
void replace_cpu_rows(std::vector<Weight>& weights, bool per_channel, const ProjectRow& project);

}  // namespace cctorch::regularize
