#include "csrc/ops/gather_channels.h"

#include <torch/library.h>

namespace cctorch::meta {
namespace {

at::Tensor gather_channels(const at::Tensor& x, const at::Tensor& index, int64_t dim) {
  dim = check_gather_channels(x, index, dim);
  return empty_with_channels(x, dim, index.sym_size(0));
}

at::Tensor scatter_channels(const at::Tensor& y, const at::Tensor& index, int64_t dim, c10::SymInt channels) {
  dim = check_scatter_channels(y, index, dim, channels);
  return empty_with_channels(y, dim, channels);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Meta, m) {
  m.impl("gather_channels", &gather_channels);
  m.impl("scatter_channels", &scatter_channels);
}

}  // namespace cctorch::meta
