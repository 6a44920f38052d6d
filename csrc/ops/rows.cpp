#include "csrc/ops/rows.h"

#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>

#include <map>

namespace cctorch {

namespace {

// Rows in the shape of x; a view where its dimensions are in the order of the rows.
at::Tensor in_shape_of(const at::Tensor& x, const at::Tensor& rows, std::optional<int64_t> axis) {
  if (!axis) return rows.reshape(x.sizes());
  return rows.reshape(x.movedim(*axis, 0).sizes()).movedim(0, *axis);
}

}  // namespace

at::Tensor like(const at::Tensor& x, const at::Tensor& rows, std::optional<int64_t> axis) {
  return at::empty_like(x).copy_(in_shape_of(x, rows, axis));
}

std::vector<at::Tensor> map_rows(at::TensorList xs, std::optional<int64_t> axis,
                                 const std::function<at::Tensor(const at::Tensor& rows)>& project) {
  std::map<int64_t, std::vector<size_t>> members;  // of each width
  std::vector<at::Tensor> rows, results;
  for (size_t i = 0; i < xs.size(); ++i) {
    results.push_back(at::empty_like(xs[i]));
    rows.push_back(as_rows(xs[i], axis ? std::optional(*axis < 0 ? *axis + xs[i].dim() : *axis) : axis));
    if (xs[i].numel() > 0) members[rows[i].size(1)].push_back(i);
  }
  std::vector<at::Tensor> to, from;
  for (const auto& [width, indices] : members) {
    std::vector<at::Tensor> parts;
    std::vector<int64_t> counts;
    for (const size_t i : indices) counts.push_back(parts.emplace_back(rows[i]).size(0));
    const auto projected = project(parts.size() == 1 ? parts.front() : at::cat(parts)).split_with_sizes(counts);
    for (size_t j = 0; j < indices.size(); ++j) {
      const at::Tensor& x = xs[indices[j]];
      to.push_back(results[indices[j]]);
      from.push_back(in_shape_of(x, projected[j], axis));
    }
  }
  if (!to.empty()) at::_foreach_copy_(to, from);
  return results;
}

}  // namespace cctorch
