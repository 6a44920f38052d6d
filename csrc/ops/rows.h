#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <vector>

// Values that share a grid, as a row.
namespace cctorch {

// Half precision is computed in float32.
inline at::ScalarType math_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// One row for each index of `axis` (counted from the front), or a single one.
inline at::Tensor as_rows(const at::Tensor& x, std::optional<int64_t> axis) {
  if (!axis) return x.reshape({1, -1});
  return x.movedim(*axis, 0).reshape({x.size(*axis), x.numel() / std::max<int64_t>(1, x.size(*axis))});
}

// Back into the shape of x, in its type and the layout of at::empty_like(x).
at::Tensor like(const at::Tensor& x, const at::Tensor& rows, std::optional<int64_t> axis);

// What `project` makes of the rows of each tensor of a list, which are of one type: those of one width lie below each
// other and go in one call. For a GPU, where launches are what a small tensor costs.
std::vector<at::Tensor> map_rows(at::TensorList xs, std::optional<int64_t> axis,
                                 const std::function<at::Tensor(const at::Tensor& rows)>& project);

}  // namespace cctorch
