#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/gather_channels.h>

namespace cctorch {

at::Tensor scatter_channels_symint(const at::Tensor& y, const at::Tensor& index, int64_t dim, c10::SymInt channels);

// Both return the dimension, counted from the first.
int64_t check_gather_channels(const at::Tensor& x, const at::Tensor& index, int64_t dim);
int64_t check_scatter_channels(const at::Tensor& y, const at::Tensor& index, int64_t dim, const c10::SymInt& channels);

// That of the result: channels_last stays if the channels are its own, in dimension 1.
at::MemoryFormat channels_format(const at::Tensor& x, int64_t dim);
at::Tensor empty_with_channels(const at::Tensor& like, int64_t dim, const c10::SymInt& channels);

}  // namespace cctorch
