#include <ATen/ATen.h>
#include <cctorch/regularize.h>

#include <algorithm>
#include <cmath>

#include "csrc/largest_first.h"
#include "csrc/ops/best_grids.h"
#include "csrc/ops/cpu/channelwise.h"
#include "csrc/ops/cpu/simd/uniform_grid.h"
#include "csrc/ops/fake_quant_weights.h"
#include "csrc/regularize/matrices.h"

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

at::Tensor quantize(const at::Tensor& rows, at::ScalarType type, double q, Range range) {
  const Grid grid(rows, q);
  const at::Tensor largest = rows.abs().amax(-1, true);
  at::Tensor plain = rounded(grid.levels(largest), type);
  if (range == Range::absmax) return plain;
  const at::Tensor reach = q == 1 ? ternary_reach(rows) : searched_reach(grid, largest);
  const at::Tensor searched = rounded(grid.levels(rounded(reach, type)), type);
  const auto error = [&](const at::Tensor& levels) { return (levels - rows).square_().sum(-1, true); };
  return at::where(error(searched) < error(plain) - kNoise * grid.energy(), searched, plain);
}

simd::UniformGrid uniform_grid(at::ScalarType type) {
  const auto storage = channelwise::storage(type);
  switch (isa()) {
    case Isa::kAvx512:
      return simd::avx512::uniform_grid(storage);
    case Isa::kAvx2:
      return simd::avx2::uniform_grid(storage);
    default:
      return simd::baseline::uniform_grid(storage);
  }
}

// Some rows of one weight.
struct Task {
  size_t weight;
  int64_t begin, end;
};

// The same grids row by row, each in a thread's cache.
void quantize_on_cpu(std::vector<Weight>& weights, bool per_channel, double q, bool search) {
  std::vector<SliceRows> rows;
  std::vector<Task> tasks;
  std::vector<double> costs;
  for (size_t i = 0; i < weights.size(); ++i) {
    rows.emplace_back(per_channel ? weights[i].value : weights[i].value.unsqueeze(0), 0);
    const int64_t step = std::max<int64_t>(1, 16384 / rows[i].size());
    for (int64_t begin = 0; begin < rows[i].count(); begin += step) {
      tasks.push_back({i, begin, std::min(begin + step, rows[i].count())});
      costs.push_back(static_cast<double>((tasks.back().end - begin) * rows[i].size()));
    }
  }
  largest_first(costs, [&](size_t i) {
    const SliceRows& matrix = rows[tasks[i].weight];
    const auto quantize_row = uniform_grid(matrix.from.scalar_type());
    const auto* from = static_cast<const char*>(matrix.from.const_data_ptr());
    auto* to = static_cast<char*>(matrix.to.mutable_data_ptr());
    for (int64_t row = tasks[i].begin; row < tasks[i].end; ++row) {
      const int64_t offset = row * matrix.size() * matrix.from.element_size();
      quantize_row(from + offset, to + offset, matrix.size(), q, search);
    }
  });
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i].value = rows[i].result(weights[i].value).view_as(weights[i].value);
  }
}

}  // namespace

UniformQuantization::UniformQuantization(int64_t bits, bool per_channel, Range range)
    : bits_(bits), per_channel_(per_channel), range_(range) {
  TORCH_CHECK_VALUE(2 <= bits && bits <= 16, "UniformQuantization: bits = ", bits,
                    ", expected 2 to 16; for 1 bit use BinaryCodeQuantization");
}

void UniformQuantization::replace(std::vector<Weight>& weights) {
  const auto q = static_cast<double>((int64_t{1} << (bits_ - 1)) - 1);
  const bool search = range_ == Range::mse;
  if (weights.front().value.is_cpu() && !(search && q == 1)) {
    quantize_on_cpu(weights, per_channel_, q, search);
  } else {
    replace_rows(weights, per_channel_,
                 [&](const at::Tensor& rows, at::ScalarType type) { return quantize(rows, type, q, range_); });
  }
  for (Weight& weight : weights) {
    // Zero is a level, so what was pruned stays pruned.
    if (weight.storage.factored) weight.storage = Storage::dense(weight.value);
    weight.storage.bits_per_value = bits_;
    weight.storage.table_bits = (per_channel_ ? weight.value.size(0) : 1) * bits_per_element(weight.value);
  }
}

}  // namespace cctorch::regularize
