#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <cctorch/low_rank.h>
#include <torch/library.h>

#include <algorithm>
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

using Pair = std::array<int64_t, 2>;

struct Window {
  Window(const char* op, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation)
      : stride(pair(op, "stride", stride)),
        padding(pair(op, "padding", padding)),
        dilation(pair(op, "dilation", dilation)) {}

  static Pair pair(const char* op, const char* name, at::IntArrayRef given) {
    TORCH_CHECK(given.size() == 1 || given.size() == 2, op, ": ", name, " must be one number or two, got ",
                given.size());
    return {given.front(), given.back()};
  }

  // Along dimension 0, the height, or 1, the width.
  int64_t positions(const at::Tensor& x, int64_t dimension, int64_t kernel) const {
    const int64_t span = x.size(dimension - 2) + 2 * padding[dimension] - dilation[dimension] * (kernel - 1) - 1;
    return span < 0 ? 0 : span / std::max<int64_t>(1, stride[dimension]) + 1;
  }

  Pair stride, padding, dilation;
};

double batch_of(const at::Tensor& x) { return x.dim() == 4 ? static_cast<double>(x.size(0)) : 1.0; }

void check_image(const char* op, const at::Tensor& x, const at::Tensor& first) {
  TORCH_CHECK(x.dim() == 3 || x.dim() == 4, op,
              ": x must be batch x in_channels x height x width, or that without the batch, got shape ", x.sym_sizes());
  TORCH_SYM_CHECK(x.sym_size(-3).sym_eq(first.sym_size(1)), op, ": x must have the ", first.sym_size(1),
                  " input channels of first, got shape ", x.sym_sizes());
}

void check_point(const char* op, const char* name, const at::Tensor& factor) {
  TORCH_SYM_CHECK(factor.sym_size(2).sym_eq(1).sym_and(factor.sym_size(3).sym_eq(1)), op, ": ", name,
                  " must be a 1 x 1 convolution, got shape ", factor.sym_sizes());
}

// N x C x kh x kw of two factors of which at most one extends in each dimension.
at::Tensor merged(const at::Tensor& first, const at::Tensor& second) {
  const auto outer = second.sizes(), inner = first.sizes();
  const at::Tensor product =
      at::matmul(second.permute({0, 2, 3, 1}).reshape({-1, outer[1]}), first.reshape({inner[0], -1}));
  return product.view({outer[0], outer[2], outer[3], inner[1], inner[2], inner[3]})
      .permute({0, 3, 1, 4, 2, 5})
      .reshape({outer[0], inner[1], outer[2] * inner[2], outer[3] * inner[3]});
}

bool merged_is_cheaper(const at::Tensor& x, const at::Tensor& first, const at::Tensor& second, const Window& window) {
  if (has_symbolic_sizes(x) || has_symbolic_sizes(first) || has_symbolic_sizes(second)) return false;
  const int64_t height = window.positions(x, 0, first.size(2) * second.size(2));
  const int64_t width = window.positions(x, 1, first.size(3) * second.size(3));
  const double after = batch_of(x) * static_cast<double>(height * width);
  const double between = batch_of(x) * static_cast<double>((second.size(2) != 1 ? x.size(-2) : height) *
                                                           (second.size(3) != 1 ? x.size(-1) : width));
  const auto inner = static_cast<double>(first.numel()), outer = static_cast<double>(second.numel());
  const auto rank = static_cast<double>(first.size(0));
  const double product = inner * outer / (rank * rank);
  return product * (rank + after) < inner * between + outer * after;
}

bool merged_is_cheaper(const at::Tensor& x, const at::Tensor& first, const at::Tensor& core, const at::Tensor& second,
                       const Window& window) {
  for (const auto& t : {x, first, core, second}) {
    if (has_symbolic_sizes(t)) return false;
  }
  const double before = batch_of(x) * static_cast<double>(x.size(-2) * x.size(-1));
  const double after =
      batch_of(x) * static_cast<double>(window.positions(x, 0, core.size(2)) * window.positions(x, 1, core.size(3)));
  const auto a = static_cast<double>(first.numel()), b = static_cast<double>(core.numel());
  const auto c = static_cast<double>(second.numel());
  // Entries of core and first multiplied out, and of all three.
  const double two = b * static_cast<double>(first.size(1)) / static_cast<double>(core.size(1));
  const double three = two * static_cast<double>(second.size(0)) / static_cast<double>(core.size(0));
  const double multiplying = b * static_cast<double>(first.size(1)) + two * static_cast<double>(second.size(0));
  return multiplying + three * after < a * before + (b + c) * after;
}

at::Tensor composite_conv2d(const at::Tensor& x, const at::Tensor& first, const at::Tensor& second,
                            const std::optional<at::Tensor>& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation) {
  constexpr auto op = "low_rank_conv2d";
  check_factors(op, first, second, 4, bias);
  check_image(op, x, first);
  const bool high = second.sym_size(2) != 1, wide = second.sym_size(3) != 1;
  TORCH_CHECK(
      (!high || first.sym_size(2) == 1) && (!wide || first.sym_size(3) == 1), op,
      ": second must be a 1 x 1 convolution, or extend in a dimension that first does not extend in, got shapes ",
      first.sym_sizes(), " and ", second.sym_sizes());
  const Window window(op, stride, padding, dilation);
  if (merged_is_cheaper(x, first, second, window)) {
    return at::conv2d(x, merged(first, second), bias, window.stride, window.padding, window.dilation);
  }
  // Both numbers of each pair are spelled out: an exporter that reads the trace takes a list of one for one dimension.
  const auto where_outer = [&](const Pair& given, int64_t elsewhere, bool outer) {
    return Pair{high == outer ? given[0] : elsewhere, wide == outer ? given[1] : elsewhere};
  };
  const auto convolve = [&](const at::Tensor& input, const at::Tensor& factor,
                            const std::optional<at::Tensor>& constant, bool outer) {
    return at::conv2d(input, factor, constant, where_outer(window.stride, 1, outer),
                      where_outer(window.padding, 0, outer), where_outer(window.dilation, 1, outer));
  };
  return convolve(convolve(x, first, {}, false), second, bias, true);
}

at::Tensor composite_tucker2_conv2d(const at::Tensor& x, const at::Tensor& first, const at::Tensor& core,
                                    const at::Tensor& second, const std::optional<at::Tensor>& bias,
                                    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  constexpr auto op = "tucker2_conv2d";
  TORCH_CHECK(core.dim() == 4, op, ": core must have 4 dimensions, rank_out x rank_in x height x width, got shape ",
              core.sym_sizes());
  TORCH_CHECK(first.dim() == 4, op, ": first must have 4 dimensions, rank_in x in_channels x 1 x 1, got shape ",
              first.sym_sizes());
  check_factors(op, core, second, 4, bias);
  check_image(op, x, first);
  check_point(op, "first", first);
  check_point(op, "second", second);
  TORCH_SYM_CHECK(core.sym_size(1).sym_eq(first.sym_size(0)), op, ": core must have the rank of first, ",
                  first.sym_size(0), ", in dimension 1, got shape ", core.sym_sizes());
  const Window window(op, stride, padding, dilation);
  if (merged_is_cheaper(x, first, core, second, window)) {
    const at::Tensor inner = at::matmul(core.permute({0, 2, 3, 1}), first.flatten(1)).permute({0, 3, 1, 2});
    return at::conv2d(x, merged(inner, second), bias, window.stride, window.padding, window.dilation);
  }
  constexpr Pair ones{1, 1}, zeros{0, 0};
  const at::Tensor inner = at::conv2d(x, first, {}, ones, zeros, ones);
  const at::Tensor narrow = at::conv2d(inner, core, {}, window.stride, window.padding, window.dilation);
  return at::conv2d(narrow, second, bias, ones, zeros, ones);
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

at::Tensor tucker2_conv2d(const at::Tensor& x, const at::Tensor& first, const at::Tensor& core,
                          const at::Tensor& second, const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::tucker2_conv2d", "").typed<decltype(tucker2_conv2d)>();
  return op.call(x, first, core, second, bias, stride, padding, dilation);
}

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  m.def("low_rank_linear(Tensor x, Tensor first, Tensor second, Tensor? bias=None) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "low_rank_conv2d(Tensor x, Tensor first, Tensor second, Tensor? bias=None, int[2] stride=1, int[2] padding=0, "
      "int[2] dilation=1) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "tucker2_conv2d(Tensor x, Tensor first, Tensor core, Tensor second, Tensor? bias=None, int[2] stride=1, "
      "int[2] padding=0, int[2] dilation=1) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(cctorch, CompositeImplicitAutograd, m) {
  m.impl("low_rank_linear", &composite_linear);
  m.impl("low_rank_conv2d", &composite_conv2d);
  m.impl("tucker2_conv2d", &composite_tucker2_conv2d);
}

}  // namespace cctorch
