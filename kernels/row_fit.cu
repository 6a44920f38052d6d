#include "kernels/row_fit.cuh"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <cmath>

#include "csrc/ops/formula/layout.h"
#include "csrc/ops/row_fits.h"
#include "kernels/launch.cuh"

namespace cctorch::cuda {
namespace {

row_fit::SortedRows rows_of(const at::Tensor& values, const at::Tensor& sums) {
  return {values.const_data_ptr<double>(), sums.const_data_ptr<double>(), values.size(-1)};
}

at::Tensor searched_reach(const at::Tensor& rows, double q) {
  const c10::cuda::CUDAGuard guard(rows.device());
  const at::Tensor from = rows.contiguous(), reach = at::empty({rows.size(0), 1}, rows.options());
  if (rows.size(0) == 0) return reach;
  row_fit::SearchReach kernel{from.const_data_ptr<double>(),
                              reach.mutable_data_ptr<double>(),
                              from.size(1),
                              q,
                              row_fits::kRefinements,
                              row_fits::kClips,
                              {}};
  static_assert(row_fits::kClips <= row_fit::SearchReach::kMostClips);
  for (int k = 0; k < row_fits::kClips; ++k) kernel.clip[k] = std::pow(row_fits::kClipRatio, k + 1);
  Launch()(rows.size(0), kernel);
  return reach;
}

at::Tensor lloyd(const at::Tensor& values, const at::Tensor& sums, const at::Tensor& centers) {
  if (centers.numel() == 0 || centers.size(2) > row_fit::Lloyd::kMostLevels) {
    return composed::lloyd(values, sums, centers);
  }
  const c10::cuda::CUDAGuard guard(values.device());
  const at::Tensor sorted = values.contiguous(), running = sums.contiguous();
  at::Tensor levels = centers.clone(at::MemoryFormat::Contiguous);
  Launch()(levels.size(0) * levels.size(1), row_fit::Lloyd{rows_of(sorted, running), levels.mutable_data_ptr<double>(),
                                                           levels.size(1), levels.size(2), row_fits::kIterations});
  return levels;
}

at::Tensor alternated(const at::Tensor& values, const at::Tensor& sums, const at::Tensor& scales) {
  if (scales.numel() == 0 || scales.size(-1) != row_fit::Alternate::kBits) {
    return composed::alternated(values, sums, scales);
  }
  const c10::cuda::CUDAGuard guard(values.device());
  const at::Tensor sorted = values.contiguous(), running = sums.contiguous();
  at::Tensor fitted = scales.clone(at::MemoryFormat::Contiguous);
  Launch()(ceil_div(fitted.size(0), static_cast<int64_t>(kWarps)),
           row_fit::Alternate{rows_of(sorted, running), fitted.mutable_data_ptr<double>(), fitted.size(0),
                              row_fits::kTurns});
  return fitted;
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CUDA, m) {
  m.impl("_searched_reach", &searched_reach);
  m.impl("_lloyd", &lloyd);
  m.impl("_alternated", &alternated);
}

}  // namespace cctorch::cuda
