#include "csrc/ops/sorted_rows.h"

#include <ATen/ATen.h>

namespace cctorch {

SortedRows::SortedRows(const at::Tensor& rows)
    : values_(std::get<0>(at::sort(rows))), sums_(at::constant_pad_nd(values_.cumsum(-1), {1, 0})) {}

SortedRows::Cells SortedRows::cells(const at::Tensor& bounds) const {
  const at::Tensor inner = at::searchsorted(values_, bounds.contiguous(), /*out_int32=*/false, /*right=*/true);
  const at::Tensor first = at::constant_pad_nd(inner, {1, 0});
  const at::Tensor end = at::constant_pad_nd(inner, {0, 1}, values_.size(-1));
  return {(end - first).to(at::kDouble), sums_.gather(-1, end) - sums_.gather(-1, first)};
}

at::Tensor midpoints(const at::Tensor& levels) {
  const int64_t inner = levels.size(-1) - 1;
  return (levels.narrow(-1, 0, inner) + levels.narrow(-1, 1, inner)) / 2;
}

at::Tensor nearest(const at::Tensor& rows, const at::Tensor& levels) {
  return levels.gather(-1, at::searchsorted(midpoints(levels).contiguous(), rows.contiguous()));
}

}  // namespace cctorch
