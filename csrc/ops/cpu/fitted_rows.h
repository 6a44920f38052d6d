#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "csrc/ops/cpu/row_blocks.h"
#include "csrc/ops/cpu/simd/stores.h"
#include "csrc/ops/fake_quant_weights.h"

// Weights of which every row is quantized with parameters that are found in the row: it is read for them, then written
// from the cache while the next one arrives there.
namespace cctorch::cpu {

// Rows of one weight that a thread takes at once; they stay in its cache between the two passes over each.
struct RowTask {
  size_t weight;
  int64_t begin, end;
};

// Rows of more elements are gone through by all threads together.
constexpr int64_t kLongRow = 2 * kRowBlock;

inline std::vector<RowTask> row_tasks(const std::vector<SliceRows>& rows) {
  constexpr int64_t kTaskElements = 65536;
  std::vector<RowTask> result;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].to.numel() == 0 || rows[i].size() > kLongRow) continue;
    const int64_t step = std::max<int64_t>(1, kTaskElements / rows[i].size());
    for (int64_t begin = 0; begin < rows[i].count(); begin += step) {
      result.push_back({i, begin, std::min(begin + step, rows[i].count())});
    }
  }
  return result;
}

template <typename S>
void prefetch(const S* from, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(from + i, /*rw=*/0, /*locality=*/2);
}

// For every row: parameters = fit(state, weight, row, from, size), where each thread has a State of its own, then
// write(state, parameters, to, from, offset, size, stores) of parts that begin at `offset`.
template <typename S, typename State, typename Fit, typename Write>
void fit_rows(const std::vector<SliceRows>& rows, const Fit& fit, const Write& write) {
  // While one part of a row is written the same part of the next row comes into the cache.
  constexpr int64_t kPart = 1024;
  int64_t elements = 0;
  for (const SliceRows& weight : rows) elements += weight.to.numel();
  const simd::Stores stores = simd::stores_for(elements * static_cast<int64_t>(sizeof(S)));
  const auto tasks = row_tasks(rows);
  at::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t first, int64_t last) {
    const simd::Fence fence(stores);
    State state;
    for (int64_t i = first; i < last; ++i) {
      const SliceRows& weight = rows[tasks[i].weight];
      const int64_t size = weight.size();
      for (int64_t row = tasks[i].begin; row < tasks[i].end; ++row) {
        const S* from = weight.from.const_data_ptr<S>() + row * size;
        S* to = weight.to.mutable_data_ptr<S>() + row * size;
        const auto parameters = fit(state, tasks[i].weight, row, from, size);
        for (int64_t part = 0; part < size; part += kPart) {
          const int64_t length = std::min(kPart, size - part);
          if (row + 1 < tasks[i].end) prefetch(from + size + part, length);
          write(state, parameters, to + part, from + part, part, length, stores);
        }
      }
    }
  });
  State state;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].to.numel() == 0 || rows[i].size() <= kLongRow) continue;
    const int64_t size = rows[i].size();
    for (int64_t row = 0; row < rows[i].count(); ++row) {
      const S* from = rows[i].from.const_data_ptr<S>() + row * size;
      S* to = rows[i].to.mutable_data_ptr<S>() + row * size;
      const auto parameters = fit(state, i, row, from, size);
      for_each_block(size, [&](int64_t, int64_t begin, int64_t length) {
        const simd::Fence fence(stores);
        write(state, parameters, to + begin, from + begin, begin, length, stores);
      });
    }
  }
}

// The rows of each x of a list, and the list of what became of them.
inline std::vector<SliceRows> rows_of(at::TensorList xs, std::optional<int64_t> axis) {
  std::vector<SliceRows> rows;
  for (const at::Tensor& x : xs) rows.emplace_back(x, axis);
  return rows;
}

inline std::vector<at::Tensor> results_of(const std::vector<SliceRows>& rows, at::TensorList xs) {
  std::vector<at::Tensor> results;
  for (size_t i = 0; i < rows.size(); ++i) results.push_back(rows[i].result(xs[i]));
  return results;
}

}  // namespace cctorch::cpu
