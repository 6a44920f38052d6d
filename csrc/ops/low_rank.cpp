#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <cctorch/low_rank.h>
#include <torch/library.h>

#include <array>

#include "csrc/ops/checks.h"

namespace cctorch {
namespace {

void check_factors(const char* op, const at::Tensor& first, const at::Tensor& second, int64_t dim,
                   const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(first.dim() == dim, op, ": first must have ", dim, " dimensions, rank x in_channels",
              dim == 4 ? " x height x width" : "", ", got shape ", first.sym_sizes());
  TORCH_CHECK(second.dim() == dim, op, ": second must have ", dim, " dimensions, out_channels x rank",
              dim == 4 ? " x 1 x 1" : "", ", got shape ", second.sym_sizes());
  TORCH_SYM_CHECK(second.sym_size(1).sym_eq(first.sym_size(0)), op, ": second must have the rank of first, ",
                  first.sym_size(0), ", in dimension 1, got shape ", second.sym_sizes());
  if (!bias) return;
  TORCH_CHECK(bias->dim() == 1, op, ": bias must be one-dimensional, got shape ", bias->sym_sizes());
  TORCH_SYM_CHECK(bias->sym_size(0).sym_eq(second.sym_size(0)), op, ": bias must have one element for each of the ",
                  second.sym_size(0), " outputs, got ", bias->sym_size(0));
}

bool has_symbolic_sizes(const at::Tensor& t) { return t.unsafeGetTensorImpl()->has_symbolic_sizes_strides(); }

bool merged_is_cheaper(const at::Tensor& x, const at::Tensor& first, const at::Tensor& second) {
  // A decision on a symbolic size would tie the compiled program to it.
  if (has_symbolic_sizes(x) || has_symbolic_sizes(first) || has_symbolic_sizes(second)) return false;
  const auto in = static_cast<double>(first.size(1));
  const auto rank = static_cast<double>(first.size(0));
  const auto out = static_cast<double>(second.size(0));
  const double rows = in > 0 ? static_cast<double>(x.numel()) / in : 0;
  return out * rank * in + rows * in * out < rows * rank * (in + out);
}

at::Tensor composite_linear(const at::Tensor& x, const at::Tensor& first, const at::Tensor& second,
                            const std::optional<at::Tensor>& bias) {
  constexpr auto op = "low_rank_linear";
  check_factors(op, first, second, 2, bias);
  TORCH_CHECK(x.dim() >= 1, op, ": x must have at least one dimension, ... x in_channels, got a scalar");
  TORCH_SYM_CHECK(x.sym_size(-1).sym_eq(first.sym_size(1)), op, ": the last dimension of x must be the ",
                  first.sym_size(1), " input channels of first, got shape ", x.sym_sizes());
  if (merged_is_cheaper(x, first, second)) return at::linear(x, at::matmul(second, first), bias);
  return at::linear(at::linear(x, first), second, bias);
}

at::Tensor composite_conv2d(const at::Tensor& x, const at::Tensor& first, const at::Tensor& second,
                            const std::optional<at::Tensor>& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation) {
  constexpr auto op = "low_rank_conv2d";
  check_factors(op, first, second, 4, bias);
  TORCH_CHECK(x.dim() == 3 || x.dim() == 4, op,
              ": x must be batch x in_channels x height x width, or that without the batch, got shape ", x.sym_sizes());
  TORCH_SYM_CHECK(x.sym_size(-3).sym_eq(first.sym_size(1)), op, ": x must have the ", first.sym_size(1),
                  " input channels of first, got shape ", x.sym_sizes());
  TORCH_SYM_CHECK(second.sym_size(2).sym_eq(1).sym_and(second.sym_size(3).sym_eq(1)), op,
                  ": second must be a 1 x 1 convolution, got shape ", second.sym_sizes());
  // Both numbers of each pair are spelled out: an exporter that reads the trace takes a list of one for one dimension.
  constexpr std::array<int64_t, 2> ones{1, 1};
  constexpr std::array<int64_t, 2> zeros{0, 0};
  return at::conv2d(at::conv2d(x, first, {}, stride, padding, dilation), second, bias, ones, zeros, ones);
}

}  // namespace

at::Tensor low_rank_linear(const at::Tensor& x, const at::Tensor& first, const at::Tensor& second,
                           const std::optional<at::Tensor>& bias) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::low_rank_linear", "").typed<decltype(low_rank_linear)>();
  return op.call(x, first, second, bias);
}

at::Tensor low_rank_conv2d(const at::Tensor& x, const at::Tensor& first, const at::Tensor& second,
                           const std::optional<at::Tensor>& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                           at::IntArrayRef dilation) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::low_rank_conv2d", "").typed<decltype(low_rank_conv2d)>();
  return op.call(x, first, second, bias, stride, padding, dilation);
}

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  m.def("low_rank_linear(Tensor x, Tensor first, Tensor second, Tensor? bias=None) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "low_rank_conv2d(Tensor x, Tensor first, Tensor second, Tensor? bias=None, int[2] stride=1, int[2] padding=0, "
      "int[2] dilation=1) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(cctorch, CompositeImplicitAutograd, m) {
  m.impl("low_rank_linear", &composite_linear);
  m.impl("low_rank_conv2d", &composite_conv2d);
}

}  // namespace cctorch
