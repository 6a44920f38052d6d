#include "csrc/ops/gather_channels.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"

namespace cctorch {

at::Tensor gather_channels(const at::Tensor& x, const at::Tensor& index, int64_t dim) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::gather_channels", "").typed<decltype(gather_channels)>();
  return op.call(x, index, dim);
}

at::Tensor scatter_channels_symint(const at::Tensor& y, const at::Tensor& index, int64_t dim, c10::SymInt channels) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cctorch::scatter_channels", "")
                             .typed<decltype(scatter_channels_symint)>();
  return op.call(y, index, dim, std::move(channels));
}

at::Tensor scatter_channels(const at::Tensor& y, const at::Tensor& index, int64_t dim, int64_t channels) {
  return scatter_channels_symint(y, index, dim, channels);
}

int64_t check_gather_channels(const at::Tensor& x, const at::Tensor& index, int64_t dim) {
  constexpr auto op = "gather_channels";
  check_floating(x, op, "x");
  TORCH_CHECK(index.scalar_type() == at::kLong && index.dim() == 1, op,
              ": index must be int64 and one-dimensional, got ", index.scalar_type(), " of shape ", index.sym_sizes());
  check_same_device(x, op, "x", index, "index");
  TORCH_CHECK(-x.dim() <= dim && dim < x.dim(), op, ": dim must be in [", -x.dim(), ", ", x.dim() - 1, "] for a ",
              x.dim(), "-dimensional x, got ", dim);
  return dim < 0 ? dim + x.dim() : dim;
}

int64_t check_scatter_channels(const at::Tensor& y, const at::Tensor& index, int64_t dim, const c10::SymInt& channels) {
  dim = check_gather_channels(y, index, dim);
  TORCH_SYM_CHECK(y.sym_size(dim).sym_eq(index.sym_size(0)), "scatter_channels: y must have a channel (dimension ", dim,
                  ") for each of the ", index.sym_size(0), " entries of index, got ", y.sym_size(dim));
  TORCH_SYM_CHECK(channels.sym_ge(0), "scatter_channels: channels must not be negative, got ", channels);
  return dim;
}

at::MemoryFormat channels_format(const at::Tensor& x, int64_t dim) {
  return dim == 1 ? x.suggest_memory_format() : at::MemoryFormat::Contiguous;
}

at::Tensor empty_with_channels(const at::Tensor& like, int64_t dim, const c10::SymInt& channels) {
  auto sizes = like.sym_sizes().vec();
  sizes[dim] = channels;
  return at::empty_symint(sizes, like.options(), channels_format(like, dim));
}

namespace {

// Channels as the last dimension: index_select() and index_add() keep that one contiguous.
at::Tensor gathered(const at::Tensor& x, const at::Tensor& index, int64_t dim) {
  dim = check_gather_channels(x, index, dim);
  if (channels_format(x, dim) == at::MemoryFormat::Contiguous) return at::index_select(x, dim, index);
  return at::index_select(x.movedim(dim, -1), -1, index).movedim(-1, dim);
}

at::Tensor scattered(const at::Tensor& y, const at::Tensor& index, int64_t dim, c10::SymInt channels) {
  dim = check_scatter_channels(y, index, dim, channels);
  const at::Tensor x = empty_with_channels(y, dim, channels).zero_();
  if (channels_format(y, dim) == at::MemoryFormat::Contiguous) return x.index_add_(dim, index, y);
  x.movedim(dim, -1).index_add_(-1, index, y.movedim(dim, -1));
  return x;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  m.def("gather_channels(Tensor x, Tensor index, int dim=1) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("scatter_channels(Tensor y, Tensor index, int dim, SymInt channels) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(cctorch, CompositeExplicitAutograd, m) {
  m.impl("gather_channels", &gathered);
  m.impl("scatter_channels", &scattered);
}

}  // namespace cctorch
