#include "csrc/regularize/uniform_grid.h"

#include <ATen/ATen.h>

#include <cmath>

#include "csrc/ops/best_grids.h"

namespace cctorch::regularize {

namespace {

// Squared errors are compared to this fraction of ||w||^2: what is on a grid already must not move to an equal one.
constexpr double kNoise = 1e-12;
constexpr int kClips = 30;
constexpr double kClipRatio = 0.9;
constexpr int kRefinements = 10;

at::Tensor rounded(const at::Tensor& x, at::ScalarType type) { return x.to(type).to(at::kDouble); }

// A symmetric grid of 2 q + 1 levels for each row. It is described by its largest level, `reach`: this one is then an
// element of the quantized row, and quantizing again finds it.
class Grid {
 public:
  Grid(const at::Tensor& rows, double q) : rows_(rows), q_(q), energy_(rows.square().sum(-1, true)) {}

  at::Tensor codes(const at::Tensor& reach) const {
    return (rows_ / at::where(reach > 0, reach, 1.0)).mul_(q_).round_().clamp_(-q_, q_);
  }

  at::Tensor levels(const at::Tensor& reach) const { return codes(reach).div_(q_).mul_(reach); }

  // The best reach for the codes that `reach` gives, up to `limit`, and its squared error.
  std::pair<at::Tensor, at::Tensor> refit(const at::Tensor& reach, const at::Tensor& limit) const {
    const at::Tensor code = codes(reach);
    const at::Tensor dot = (rows_ * code).sum(-1, true);
    const at::Tensor square = code.square().sum(-1, true);
    const at::Tensor fitted = at::minimum(dot / square.clamp_min(1) * q_, limit);
    const at::Tensor step = fitted / q_;
    return {fitted, energy_ - 2 * step * dot + step.square() * square};
  }

  const at::Tensor& energy() const { return energy_; }

 private:
  at::Tensor rows_;
  double q_;
  at::Tensor energy_;
};

at::Tensor searched_reach(const Grid& grid, const at::Tensor& largest) {
  auto [reach, error] = grid.refit(largest, largest);
  const auto keep_better = [&](const std::pair<at::Tensor, at::Tensor>& other) {
    const at::Tensor better = other.second < error;
    reach = at::where(better, other.first, reach);
    error = at::where(better, other.second, error);
  };
  for (int k = 1; k <= kClips; ++k) keep_better(grid.refit(largest * std::pow(kClipRatio, k), largest));
  for (int i = 0; i < kRefinements; ++i) keep_better(grid.refit(reach, largest));
  return reach;
}

}  // namespace

at::Tensor on_uniform_grid(const at::Tensor& rows, at::ScalarType type, double q, Range range) {
  const Grid grid(rows, q);
  const at::Tensor largest = rows.abs().amax(-1, true);
  at::Tensor plain = rounded(grid.levels(largest), type);
  if (range == Range::absmax) return plain;
  const at::Tensor reach = q == 1 ? ternary_reach(rows) : searched_reach(grid, largest);
  const at::Tensor searched = rounded(grid.levels(rounded(reach, type)), type);
  const auto error = [&](const at::Tensor& levels) { return (levels - rows).square_().sum(-1, true); };
  return at::where(error(searched) < error(plain) - kNoise * grid.energy(), searched, plain);
}

}  // namespace cctorch::regularize
