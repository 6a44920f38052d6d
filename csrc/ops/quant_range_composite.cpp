#include <ATen/ATen.h>
#include <cctorch/fake_quant.h>
#include <torch/library.h>

#include <limits>

#include "csrc/ops/quant_range.h"
#include "csrc/ops/rows.h"

namespace cctorch::composite {
namespace {

constexpr int kCandidates = 100;

struct Ends {
  at::Tensor low, high;  // one element for each row
};

Ends ends(const at::Tensor& rows) { return {rows.amin(-1), rows.amax(-1)}; }

// A scale that is positive and finite; 1 where there is none, which serves a row of zeros.
at::Tensor usable(const at::Tensor& scale) {
  const double largest = scale.scalar_type() == at::kDouble ? std::numeric_limits<double>::max()
                                                            : static_cast<double>(std::numeric_limits<float>::max());
  return at::where(scale > 0, scale.clamp_max(largest), 1.0);
}

at::Tensor squared_error(const at::Tensor& rows, const at::Tensor& quantized) {
  return (quantized - rows).square_().sum(-1, /*keepdim=*/false, at::kDouble);
}

at::Tensor symmetric_scale(const Ends& range, int64_t qmin, int64_t qmax) {
  at::Tensor scale = at::zeros_like(range.low);
  if (qmax > 0) scale = at::maximum(scale, range.high / qmax);
  if (qmin < 0) scale = at::maximum(scale, range.low / qmin);
  return usable(scale);
}

// Equal ends are the level next to zero, so that they come back exactly.
std::tuple<at::Tensor, at::Tensor> scale_and_offset(const Ends& range, int64_t qmin, int64_t qmax) {
  const at::Tensor width = (range.high - range.low) / (qmax - qmin);
  const at::Tensor scale = usable(width);
  const int64_t zero = std::min(std::max<int64_t>(0, qmin), qmax);
  return {scale, at::where(width > 0, range.low - scale * qmin, range.low - scale * zero)};
}

at::Tensor quant_range(const at::Tensor& x, int64_t qmin, int64_t qmax, std::optional<int64_t> axis,
                       std::string_view method) {
  axis = check_quant_range("quant_range", x, qmin, qmax, axis, method);
  const at::Tensor rows = as_rows(x, axis).to(math_type(x));
  if (x.numel() == 0) return at::zeros({rows.size(0)}, rows.options());
  const at::Tensor whole = symmetric_scale(ends(rows), qmin, qmax);
  at::Tensor best = whole, smallest;
  for (int k = 0; method == "mse" && k < kCandidates; ++k) {
    const at::Tensor scale = whole * (1 - static_cast<double>(k) / kCandidates);
    const at::Tensor error = squared_error(rows, fake_quant(rows, scale.log(), qmin, qmax, 0));
    best = k == 0 ? scale : at::where(error < smallest, scale, best);
    smallest = k == 0 ? error : at::minimum(error, smallest);
  }
  return best.log();
}

// Moves one end towards the other, `step` hundredths of their distance at a time.
template <typename Move>
Ends search(const at::Tensor& rows, const Ends& start, int64_t qmin, int64_t qmax, const Move& move) {
  Ends best = start;
  at::Tensor smallest;
  for (int k = 0; k < kCandidates; ++k) {
    const Ends range = move(start, static_cast<double>(k) / kCandidates);
    const auto [scale, offset] = scale_and_offset(range, qmin, qmax);
    const at::Tensor error = squared_error(rows, fake_quant_offset(rows, scale.log(), offset, qmin, qmax, 0));
    if (k == 0) {
      smallest = error;
      continue;
    }
    const at::Tensor better = error < smallest;
    best = {at::where(better, range.low, best.low), at::where(better, range.high, best.high)};
    smallest = at::minimum(error, smallest);
  }
  return best;
}

std::tuple<at::Tensor, at::Tensor> quant_range_offset(const at::Tensor& x, int64_t qmin, int64_t qmax,
                                                      std::optional<int64_t> axis, std::string_view method) {
  axis = check_quant_range("quant_range_offset", x, qmin, qmax, axis, method);
  const at::Tensor rows = as_rows(x, axis).to(math_type(x));
  if (x.numel() == 0) return {at::zeros({rows.size(0)}, rows.options()), at::zeros({rows.size(0)}, rows.options())};
  Ends range = ends(rows);
  if (method == "mse") {
    range = search(rows, range, qmin, qmax,
                   [](const Ends& e, double part) { return Ends{e.low, e.high - (e.high - e.low) * part}; });
    range = search(rows, range, qmin, qmax,
                   [](const Ends& e, double part) { return Ends{e.low + (e.high - e.low) * part, e.high}; });
  }
  const auto [scale, offset] = scale_and_offset(range, qmin, qmax);
  return {scale.log(), offset};
}

void observe_range_(at::Tensor& low, at::Tensor& high, const at::Tensor& x, double momentum,
                    std::optional<int64_t> axis) {
  axis = check_observe_range(low, high, x, momentum, axis);
  if (x.numel() == 0) return;
  const Ends seen = ends(as_rows(x, axis));
  const auto update = [&](at::Tensor& average, const at::Tensor& value) {
    const at::Tensor now = value.to(average.scalar_type()).view(average.sizes());
    average.copy_(at::where(average.isinf(), now, average + (now - average) * momentum));
  };
  update(low, seen.low);
  update(high, seen.high);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CompositeExplicitAutograd, m) {
  m.impl("quant_range", &quant_range);
  m.impl("quant_range_offset", &quant_range_offset);
  m.impl("observe_range_", &observe_range_);
}

}  // namespace cctorch::composite
