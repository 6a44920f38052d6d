#include "csrc/collaborative/matrix.h"

#include <ATen/ATen.h>

namespace cctorch::collaborative {

namespace {

bool is_spatial(const LayerSpec& spec, const Options& options) {
  return low_rank_layout(spec, options.layout) == LowRankLayout::spatial;
}

}  // namespace

LowRankLayout low_rank_layout(const LayerSpec& spec, LowRankLayout wanted) {
  const bool fits = spec.kind == LayerKind::conv2d && spec.kernel_height > 1 && spec.stride_height == 1;
  return fits ? wanted : LowRankLayout::channel;
}

at::Tensor as_matrix(const at::Tensor& weight, const LayerSpec& spec, const Options& options) {
  if (!is_spatial(spec, options)) return weight;
  return weight.transpose(1, 2).reshape({-1, weight.size(1), 1, weight.size(3)});
}

LayerSpec as_matrix(const LayerSpec& spec, const Options& options) {
  LayerSpec matrix = spec;
  if (is_spatial(spec, options)) {
    matrix.out_channels *= spec.kernel_height;
    matrix.kernel_height = 1;
  }
  return matrix;
}

}  // namespace cctorch::collaborative
