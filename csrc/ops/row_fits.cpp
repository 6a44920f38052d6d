#include "csrc/ops/row_fits.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>

#include "csrc/ops/best_grids.h"
#include "csrc/ops/dispatch.h"

namespace cctorch {

using namespace row_fits;

at::Tensor searched_reach(const at::Tensor& rows, double q) {
  static const auto op = find_operator<decltype(searched_reach)>("cctorch::_searched_reach");
  return op.call(rows, q);
}

at::Tensor lloyd(const SortedRows& sorted, const at::Tensor& centers) {
  static const auto op = find_operator<decltype(composed::lloyd)>("cctorch::_lloyd");
  return op.call(sorted.values(), sorted.sums(), centers);
}

at::Tensor alternated(const SortedRows& sorted, const at::Tensor& scales) {
  static const auto op = find_operator<decltype(composed::alternated)>("cctorch::_alternated");
  return op.call(sorted.values(), sorted.sums(), scales);
}

at::Tensor all_codes(int64_t bits, const at::TensorOptions& options) {
  const at::Tensor index = at::arange(int64_t{1} << bits, options.dtype(at::kLong)).unsqueeze(-1);
  const at::Tensor bit = at::arange(bits, options.dtype(at::kLong));
  return index.bitwise_right_shift(bit).bitwise_and(1).to(at::kDouble) * 2 - 1;
}

namespace composed {

at::Tensor searched_reach(const at::Tensor& rows, double q) {
  const at::Tensor energy = rows.square().sum(-1, true), largest = rows.abs().amax(-1, true);
  // The best reach, up to the largest magnitude, for the codes that `from` gives, and its squared error.
  const auto refit = [&](const at::Tensor& from) -> std::pair<at::Tensor, at::Tensor> {
    const at::Tensor code = (rows / at::where(from > 0, from, 1.0)).mul_(q).round_().clamp_(-q, q);
    const at::Tensor dot = (rows * code).sum(-1, true);
    const at::Tensor square = code.square().sum(-1, true);
    const at::Tensor fitted = at::minimum(dot / square.clamp_min(1) * q, largest);
    const at::Tensor step = fitted / q;
    return {fitted, energy - 2 * step * dot + step.square() * square};
  };
  auto [reach, error] = refit(largest);
  const auto keep_better = [&](const std::pair<at::Tensor, at::Tensor>& other) {
    const at::Tensor better = other.second < error;
    reach = at::where(better, other.first, reach);
    error = at::where(better, other.second, error);
  };
  for (int k = 1; k <= kClips; ++k) keep_better(refit(largest * std::pow(kClipRatio, k)));
  for (int i = 0; i < kRefinements; ++i) keep_better(refit(reach));
  return reach;
}

at::Tensor lloyd(const at::Tensor& values, const at::Tensor& sums, const at::Tensor& centers) {
  const SortedRows sorted(values, sums);
  std::vector<at::Tensor> fitted = centers.unbind(1);
  for (at::Tensor& start : fitted) {
    for (int i = 0; i < kIterations; ++i) start = kmeans_step(sorted, start);
  }
  return at::stack(fitted, 1);
}

at::Tensor alternated(const at::Tensor& values, const at::Tensor& sums, const at::Tensor& scales) {
  const SortedRows sorted(values, sums);
  const at::Tensor signs = all_codes(scales.size(-1), scales.options());
  at::Tensor fitted = scales.clone();
  for (int i = 0; i < kTurns; ++i) {
    const auto [levels, order] = at::sort(at::matmul(fitted, signs.t()));
    const auto cells = sorted.cells(midpoints(levels));
    const at::Tensor code = signs.index({order});  // rows x 2^bits x bits
    const at::Tensor transposed = code.transpose(-1, -2);
    const at::Tensor gram = at::matmul(transposed, cells.counts.unsqueeze(-1) * code);
    const at::Tensor moment = at::matmul(transposed, cells.sums.unsqueeze(-1));
    fitted = at::matmul(at::linalg_pinv(gram, 1e-12, /*hermitian=*/true), moment).squeeze(-1);
  }
  return fitted;
}

}  // namespace composed

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("_searched_reach(Tensor rows, float q) -> Tensor", tags);
  m.def("_lloyd(Tensor values, Tensor sums, Tensor centers) -> Tensor", tags);
  m.def("_alternated(Tensor values, Tensor sums, Tensor scales) -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(cctorch, CompositeExplicitAutograd, m) {
  m.impl("_searched_reach", &composed::searched_reach);
  m.impl("_lloyd", &composed::lloyd);
  m.impl("_alternated", &composed::alternated);
}

}  // namespace cctorch
