#include "csrc/regularize/cpu_rows.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "csrc/largest_first.h"
#include "csrc/ops/fake_quant_weights.h"

namespace cctorch::regularize {

namespace {

// Some rows of one weight.
struct Task {
  size_t weight;
  int64_t begin, end;
};

constexpr int64_t kPerTask = 16384;

void project_row(const ProjectRow& project, const void* row, void* projected, int64_t size, at::ScalarType type) {
  thread_local cpu::RowFit fit;
  thread_local std::vector<double> values;
  values.resize(size);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "replace_cpu_rows", [&] {
    const auto* from = static_cast<const scalar_t*>(row);
    auto* to = static_cast<scalar_t*>(projected);
    for (int64_t i = 0; i < size; ++i) values[i] = static_cast<double>(from[i]);
    project(fit, values.data(), size, type);
    for (int64_t i = 0; i < size; ++i) to[i] = static_cast<scalar_t>(values[i]);
  });
}

}  // namespace

void replace_cpu_rows(std::vector<Weight>& weights, bool per_channel, const ProjectRow& project) {
  std::vector<SliceRows> rows;
  std::vector<Task> tasks;
  std::vector<double> costs;
  for (size_t i = 0; i < weights.size(); ++i) {
    rows.emplace_back(per_channel ? weights[i].value : weights[i].value.unsqueeze(0), 0);
    const int64_t step = std::max<int64_t>(1, kPerTask / rows[i].size());
    for (int64_t begin = 0; begin < rows[i].count(); begin += step) {
      tasks.push_back({i, begin, std::min(begin + step, rows[i].count())});
      costs.push_back(static_cast<double>((tasks.back().end - begin) * rows[i].size()));
    }
  }
  largest_first(costs, [&](size_t i) {
    const SliceRows& matrix = rows[tasks[i].weight];
    const int64_t bytes = matrix.size() * matrix.from.element_size();
    const auto* from = static_cast<const char*>(matrix.from.const_data_ptr());
    auto* to = static_cast<char*>(matrix.to.mutable_data_ptr());
    for (int64_t row = tasks[i].begin; row < tasks[i].end; ++row) {
      project_row(project, from + row * bytes, to + row * bytes, matrix.size(), matrix.from.scalar_type());
    }
  });
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i].value = rows[i].result(weights[i].value).view_as(weights[i].value);
  }
}

}  // namespace cctorch::regularize
