#include "csrc/ops/best_grids.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "csrc/ops/cpu/row_fit.h"
#include "csrc/ops/row_fits.h"

namespace cctorch {

namespace {

// Of sums over the elements of each row, the last of them over all: 0, or NaN where that is no number.
at::Tensor nan_unless_finite(const at::Tensor& sums) {
  const at::Tensor all = sums.narrow(-1, sums.size(-1) - 1, 1);
  return all.sub(all);
}

// Two scales give any two magnitudes a1 + a2 and a1 - a2, so the best of them are 2-means of |w|, found exactly:
// rows x 2, the larger first.
at::Tensor two_magnitudes(const at::Tensor& magnitudes) {
  const int64_t columns = magnitudes.size(-1);
  const at::Tensor upper = std::get<0>(at::sort(magnitudes, -1, /*descending=*/true)).cumsum(-1);
  const at::Tensor lower = upper.narrow(-1, columns - 1, 1) - upper;
  const at::Tensor count = at::arange(1, columns + 1, magnitudes.options());
  const at::Tensor rest = (columns - count).clamp_min(1);
  const at::Tensor best = (upper.square() / count + lower.square() / rest).argmax(-1, true);
  const at::Tensor two =
      at::cat({upper.gather(-1, best) / (best + 1), lower.gather(-1, best) / (columns - 1 - best).clamp_min(1)}, -1);
  return two + nan_unless_finite(upper);
}

at::Tensor levels_of(const at::Tensor& scales) {
  return std::get<0>(at::sort(at::matmul(scales, all_codes(scales.size(-1), scales.options()).t())));
}

// rows x bits
at::Tensor fitted_scales(const at::Tensor& rows, int64_t bits) {
  const at::Tensor magnitudes = rows.abs();
  if (bits == 1) return magnitudes.mean(-1, true);
  if (bits == 2) {
    const at::Tensor two = two_magnitudes(magnitudes);
    const at::Tensor high = two.narrow(-1, 0, 1), low = two.narrow(-1, 1, 1);
    return at::cat({(high + low) / 2, (high - low) / 2}, -1);
  }
  const at::Tensor fewer = fitted_scales(rows, bits - 1);
  const at::Tensor rest = (nearest(rows, levels_of(fewer)) - rows).abs_().mean(-1, true);
  return alternated(SortedRows(rows), at::cat({fewer, rest}, -1));
}

}  // namespace

at::Tensor with_sign_of(const at::Tensor& magnitudes, const at::Tensor& rows) {
  return at::where(rows < 0, -magnitudes, magnitudes);
}

namespace composed {

// The k largest magnitudes become +-reach, the others 0: the error is smallest where (sum of them)^2 / k is largest.
at::Tensor ternary_reach(const at::Tensor& rows) {
  const at::Tensor sums = std::get<0>(at::sort(rows.abs(), -1, /*descending=*/true)).cumsum(-1);
  const at::Tensor counts = at::arange(1, rows.size(-1) + 1, rows.options());
  const at::Tensor best = (sums.square() / counts).argmax(-1, true);
  return sums.gather(-1, best) / (best + 1) + nan_unless_finite(sums);
}

at::Tensor fitted_code(const at::Tensor& rows, int64_t bits) {
  if (bits == 1) return with_sign_of(rows.abs().mean(-1, true), rows);
  if (bits == 2) return with_sign_of(nearest(rows.abs(), two_magnitudes(rows.abs()).flip(-1)), rows);
  return nearest(rows, levels_of(fitted_scales(rows, bits)));
}

at::Tensor greedy_code(const at::Tensor& rows, int64_t bits) {
  at::Tensor code = with_sign_of(rows.abs().mean(-1, true), rows);
  for (int64_t i = 1; i < bits; ++i) {
    const at::Tensor left = rows - code;
    code = code + with_sign_of(left.abs().mean(-1, true), left);
  }
  return code;
}

}  // namespace composed

at::Tensor ternary_reach(const at::Tensor& rows) {
  if (!rows.is_cpu()) return composed::ternary_reach(rows);
  const at::Tensor from = rows.contiguous(), reach = at::empty({rows.size(0), 1}, rows.options());
  const auto* values = from.const_data_ptr<double>();
  auto* to = reach.mutable_data_ptr<double>();
  const int64_t size = from.size(1), grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, size));
  at::parallel_for(0, from.size(0), grain, [&](int64_t begin, int64_t end) {
    cpu::RowFit fit;
    for (int64_t row = begin; row < end; ++row) to[row] = fit.ternary_reach(values + row * size, size);
  });
  return reach;
}

at::Tensor kmeans_step(const SortedRows& sorted, const at::Tensor& centers) {
  const auto cells = sorted.cells(midpoints(centers));
  return at::where(cells.counts > 0, cells.sums / cells.counts.clamp_min(1), centers);
}

}  // namespace cctorch
