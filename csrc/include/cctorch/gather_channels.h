#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace cctorch {

// y[n, j, ...] = x[n, index[j], ...], for channels in dimension `dim`. The memory format of x stays, where
// at::index_select() makes channels_last contiguous, and the layer behind it turns that back. `index` holds int64.
at::Tensor gather_channels(const at::Tensor& x, const at::Tensor& index, int64_t dim = 1);

// The other way, and the derivative: x[n, c, ...] is the sum of y[n, j, ...] over all j with index[j] = c, and 0 where
// there is none.
at::Tensor scatter_channels(const at::Tensor& y, const at::Tensor& index, int64_t dim, int64_t channels);

}  // namespace cctorch
