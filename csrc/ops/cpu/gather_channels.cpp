#include "csrc/ops/gather_channels.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

namespace cctorch::cpu {
namespace {

constexpr int64_t kElements = 32768;  // of the larger tensor, for a task

int64_t tasks(int64_t elements) { return std::max<int64_t>(1, kElements / std::max<int64_t>(1, elements)); }

// The positions, which have to be channels.
const int64_t* positions(const char* op, const at::Tensor& index, int64_t channels) {
  const auto* data = index.const_data_ptr<int64_t>();
  for (int64_t j = 0; j < index.numel(); ++j) {
    TORCH_CHECK_INDEX(0 <= data[j] && data[j] < channels, op, ": index[", j, "] = ", data[j], ", expected 0 to ",
                      channels - 1, ", a channel");
  }
  return data;
}

// A tensor in memory order: outer x channels x inner.
struct Rows {
  int64_t outer = 1;
  int64_t inner = 1;

  Rows(const at::Tensor& x, int64_t dim) {
    const bool last = channels_format(x, dim) != at::MemoryFormat::Contiguous;
    for (int64_t d = 0; d < x.dim(); ++d) {
      if (d != dim) (d < dim || last ? outer : inner) *= x.size(d);
    }
  }
};

template <typename T>
void gather(T* to, const T* from, const int64_t* index, int64_t count, int64_t channels, const Rows& rows) {
  if (rows.inner == 1) {
    at::parallel_for(0, rows.outer, tasks(channels), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = 0; j < count; ++j) to[i * count + j] = from[i * channels + index[j]];
      }
    });
    return;
  }
  at::parallel_for(0, rows.outer * count, tasks(rows.inner), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::copy_n(from + (i / count * channels + index[i % count]) * rows.inner, rows.inner, to + i * rows.inner);
    }
  });
}

template <typename T>
void scatter(T* to, const T* from, const int64_t* index, int64_t count, int64_t channels, const Rows& rows) {
  at::parallel_for(0, rows.outer, tasks(channels * rows.inner), [&](int64_t begin, int64_t end) {
    std::fill(to + begin * channels * rows.inner, to + end * channels * rows.inner, T(0));
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < count; ++j) {
        T* sum = to + (i * channels + index[j]) * rows.inner;
        const T* value = from + (i * count + j) * rows.inner;
        for (int64_t k = 0; k < rows.inner; ++k) sum[k] += value[k];
      }
    }
  });
}

at::Tensor gather_channels(const at::Tensor& x, const at::Tensor& index, int64_t dim) {
  dim = check_gather_channels(x, index, dim);
  const at::Tensor picked = index.contiguous();
  const auto* from = positions("gather_channels", picked, x.size(dim));
  at::Tensor y = empty_with_channels(x, dim, picked.numel());
  if (y.numel() == 0) return y;
  const at::Tensor dense = x.contiguous(channels_format(x, dim));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "gather_channels", [&] {
    gather(y.mutable_data_ptr<scalar_t>(), dense.const_data_ptr<scalar_t>(), from, picked.numel(), x.size(dim),
           Rows(x, dim));
  });
  return y;
}

at::Tensor scatter_channels(const at::Tensor& y, const at::Tensor& index, int64_t dim, int64_t channels) {
  dim = check_scatter_channels(y, index, dim, channels);
  const at::Tensor picked = index.contiguous();
  const auto* to = positions("scatter_channels", picked, channels);
  at::Tensor x = empty_with_channels(y, dim, channels);
  if (x.numel() == 0) return x;
  const at::Tensor dense = y.contiguous(channels_format(y, dim));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, y.scalar_type(), "scatter_channels", [&] {
    scatter(x.mutable_data_ptr<scalar_t>(), dense.const_data_ptr<scalar_t>(), to, picked.numel(), channels,
            Rows(x, dim));
  });
  return x;
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) {
  m.impl("gather_channels", &gather_channels);
  m.impl("scatter_channels", &scatter_channels);
}

}  // namespace cctorch::cpu
