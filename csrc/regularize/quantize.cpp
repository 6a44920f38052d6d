#include <ATen/ATen.h>
#include <cctorch/regularize.h>

#include <algorithm>

#include "csrc/largest_first.h"
#include "csrc/ops/cpu/channelwise.h"
#include "csrc/ops/cpu/simd/uniform_grid.h"
#include "csrc/ops/fake_quant_weights.h"
#include "csrc/regularize/matrices.h"
#include "csrc/regularize/uniform_grid.h"

namespace cctorch::regularize {

namespace {

simd::UniformGrid uniform_grid(at::ScalarType type) {
  const auto storage = channelwise::storage(type);
  return for_isa(&simd::baseline::uniform_grid, &simd::avx2::uniform_grid, &simd::avx512::uniform_grid)(storage);
}

// Some rows of one weight.
struct Task {
  size_t weight;
  int64_t begin, end;
};

// The same grids row by row, each in a thread's cache.
void quantize_on_cpu(std::vector<Weight>& weights, bool per_channel, double q, bool search) {
  std::vector<SliceRows> rows;
  std::vector<Task> tasks;
  std::vector<double> costs;
  for (size_t i = 0; i < weights.size(); ++i) {
    rows.emplace_back(per_channel ? weights[i].value : weights[i].value.unsqueeze(0), 0);
    const int64_t step = std::max<int64_t>(1, 16384 / rows[i].size());
    for (int64_t begin = 0; begin < rows[i].count(); begin += step) {
      tasks.push_back({i, begin, std::min(begin + step, rows[i].count())});
      costs.push_back(static_cast<double>((tasks.back().end - begin) * rows[i].size()));
    }
  }
  largest_first(costs, [&](size_t i) {
    const SliceRows& matrix = rows[tasks[i].weight];
    const auto quantize_row = uniform_grid(matrix.from.scalar_type());
    const auto* from = static_cast<const char*>(matrix.from.const_data_ptr());
    auto* to = static_cast<char*>(matrix.to.mutable_data_ptr());
    for (int64_t row = tasks[i].begin; row < tasks[i].end; ++row) {
      const int64_t offset = row * matrix.size() * matrix.from.element_size();
      quantize_row(from + offset, to + offset, matrix.size(), q, search);
    }
  });
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i].value = rows[i].result(weights[i].value).view_as(weights[i].value);
  }
}

}  // namespace

UniformQuantization::UniformQuantization(int64_t bits, bool per_channel, Range range)
    : bits_(bits), per_channel_(per_channel), range_(range) {
  TORCH_CHECK_VALUE(2 <= bits && bits <= 16, "UniformQuantization: bits = ", bits,
                    ", expected 2 to 16; for 1 bit use BinaryCodeQuantization");
}

void UniformQuantization::replace(std::vector<Weight>& weights) {
  const auto q = static_cast<double>((int64_t{1} << (bits_ - 1)) - 1);
  const bool search = range_ == Range::mse;
  if (weights.front().value.is_cpu() && !(search && q == 1)) {
    quantize_on_cpu(weights, per_channel_, q, search);
  } else {
    replace_rows(weights, per_channel_,
                 [&](const at::Tensor& rows, at::ScalarType type) { return on_uniform_grid(rows, type, q, range_); });
  }
  for (Weight& weight : weights) {
    // Zero is a level, so what was pruned stays pruned.
    if (weight.storage.factored) weight.storage = Storage::dense(weight.value);
    weight.storage.bits_per_value = bits_;
    weight.storage.table_bits = (per_channel_ ? weight.value.size(0) : 1) * bits_per_element(weight.value);
  }
}

}  // namespace cctorch::regularize
