#include "csrc/regularize/uniform_grid.h"

#include <ATen/ATen.h>

#include "csrc/ops/best_grids.h"
#include "csrc/ops/row_fits.h"

namespace cctorch::regularize {

namespace {

// Squared errors are compared to this fraction of ||w||^2: what is on a grid already must not move to an equal one.
constexpr double kNoise = 1e-12;

at::Tensor rounded(const at::Tensor& x, at::ScalarType type) { return x.to(type).to(at::kDouble); }

// On the symmetric grid of 2 q + 1 levels of each row. It is described by its largest level, `reach`: this one is then
// an element of the quantized row, and quantizing again finds it.
at::Tensor levels(const at::Tensor& rows, double q, const at::Tensor& reach) {
  return (rows / at::where(reach > 0, reach, 1.0)).mul_(q).round_().clamp_(-q, q).div_(q).mul_(reach);
}

}  // namespace

at::Tensor on_uniform_grid(const at::Tensor& rows, at::ScalarType type, double q, Range range) {
  const at::Tensor largest = rows.abs().amax(-1, true);
  const at::Tensor plain = rounded(levels(rows, q, largest), type);
  if (range == Range::absmax) return plain;
  const at::Tensor reach = q == 1 ? ternary_reach(rows) : searched_reach(rows, q);
  const at::Tensor searched = rounded(levels(rows, q, rounded(reach, type)), type);
  const auto error = [&](const at::Tensor& quantized) { return (quantized - rows).square_().sum(-1, true); };
  const at::Tensor energy = rows.square().sum(-1, true);
  return at::where(error(searched) < error(plain) - kNoise * energy, searched, plain);
}

}  // namespace cctorch::regularize
