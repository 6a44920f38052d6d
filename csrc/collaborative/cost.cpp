#include "csrc/collaborative/cost.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

namespace cctorch::collaborative {

namespace {

void check(const LayerSpec& spec, const CostTable& table) {
  const auto rising = [](const std::vector<int64_t>& counts) {
    return std::adjacent_find(counts.begin(), counts.end(), std::greater_equal<>()) == counts.end();
  };
  TORCH_CHECK_VALUE(!table.channels.empty() && table.channels.front() >= 1 && rising(table.channels) &&
                        table.channels.back() == spec.in_channels,
                    "compress: the cost table of layer '", spec.name, "' is for ", table.channels.size(),
                    " channel counts, expected rising ones that end with all ", spec.in_channels, " channels");
  TORCH_CHECK_VALUE(table.ranks.empty() || (table.ranks.front() >= 1 && rising(table.ranks)),
                    "compress: the cost table of layer '", spec.name, "': ranks must rise and be at least 1");
  TORCH_CHECK_VALUE(table.multiple >= 1, "compress: the cost table of layer '", spec.name,
                    "': multiple = ", table.multiple, ", expected at least 1");
  TORCH_CHECK_VALUE(table.pruned.size() == table.channels.size() &&
                        table.factored.size() == table.channels.size() * table.ranks.size(),
                    "compress: the cost table of layer '", spec.name, "' has ", table.pruned.size(), " pruned and ",
                    table.factored.size(), " factored costs, expected ", table.channels.size(), " and ",
                    table.channels.size() * table.ranks.size());
  TORCH_CHECK_VALUE(!table.removed || (std::isfinite(*table.removed) && *table.removed >= 0),
                    "compress: the cost table of layer '", spec.name, "': removed = ", table.removed.value_or(0),
                    ", expected a finite cost of at least 0");
  for (const auto* costs : {&table.pruned, &table.factored}) {
    for (const double cost : *costs) {
      TORCH_CHECK_VALUE(std::isfinite(cost) && cost > 0, "compress: the cost table of layer '", spec.name, "' holds ",
                        cost, ", expected positive finite costs");
    }
  }
}

// Where a count lies between two of the grid: (1 - weight) of the lower, weight of the upper.
struct Place {
  size_t lower, upper;
  double weight;
};

Place place(const std::vector<int64_t>& grid, int64_t count) {
  const auto above = std::lower_bound(grid.begin(), grid.end(), count);
  const auto upper = static_cast<size_t>(above - grid.begin());
  if (upper == 0) return {0, 0, 0.0};  // fewer than the smallest count measured: never cheaper than that
  const auto below = static_cast<double>(grid[upper - 1]);
  return {upper - 1, upper, (static_cast<double>(count) - below) / (static_cast<double>(grid[upper]) - below)};
}

double mix(double lower, double upper, double weight) { return weight == 1 ? upper : lower + weight * (upper - lower); }

// The multiples up to `highest`, and `highest` itself.
std::vector<int64_t> steps(int64_t highest, int64_t multiple) {
  std::vector<int64_t> counts;
  for (int64_t count = multiple; count < highest; count += multiple) counts.push_back(count);
  counts.push_back(highest);
  return counts;
}

void take_if_no_dearer(Form& form, const Form& larger) {
  if (larger.cost <= form.cost) form = larger;
}

double of_a_parameter(Budget budget, const LayerSpec& spec) {
  if (budget == Budget::macs) return static_cast<double>(spec.positions);
  return budget == Budget::bytes ? static_cast<double>(spec.bits) / 8 : 1;
}

}  // namespace

int64_t in_unit(Budget budget, const LayerSpec& spec, int64_t macs) {
  if (budget == Budget::macs) return macs;
  // They are its parameters at every position.
  return static_cast<int64_t>(std::ceil(static_cast<double>(macs / spec.positions) * of_a_parameter(budget, spec)));
}

CostTable counted_costs(const LayerSpec& spec, Budget budget, int64_t multiple) {
  const int64_t inputs = spec.in_channels, outputs = spec.out_channels, kernel = spec.kernel_size();
  const int64_t highest = std::min(outputs, inputs * kernel);
  const double scale = of_a_parameter(budget, spec);
  CostTable table;
  table.multiple = multiple;
  table.channels = inputs > 1 ? std::vector<int64_t>{1, inputs} : std::vector<int64_t>{1};
  table.ranks = highest > 1 ? std::vector<int64_t>{1, highest} : std::vector<int64_t>{1};
  for (const int64_t channels : table.channels) {
    table.pruned.push_back(scale * static_cast<double>(outputs * channels * kernel));
    for (const int64_t rank : table.ranks) {
      table.factored.push_back(scale * static_cast<double>((channels * kernel + outputs) * rank));
    }
  }
  return table;
}

Cost::Cost(const LayerSpec& spec, const CostTable& table) : multiple_(table.multiple) {
  check(spec, table);
  dense_ = table.pruned.back();
  const std::vector<int64_t> channels = steps(spec.in_channels, multiple_);
  const std::vector<int64_t> ranks =
      table.ranks.empty() ? std::vector<int64_t>{} : steps(table.ranks.back(), multiple_);
  rank_steps_ = ranks.size();
  factored_.resize(channels.size() * rank_steps_);
  for (size_t c = 0; c < channels.size(); ++c) {
    const Place at = place(table.channels, channels[c]);
    pruned_.push_back({mix(table.pruned[at.lower], table.pruned[at.upper], at.weight), channels[c], std::nullopt});
    for (size_t r = 0; r < rank_steps_; ++r) {
      const Place on = place(table.ranks, ranks[r]);
      const auto along = [&](size_t row) {
        const double* costs = table.factored.data() + row * table.ranks.size();
        return mix(costs[on.lower], costs[on.upper], on.weight);
      };
      factored(c, r) = {mix(along(at.lower), along(at.upper), at.weight), channels[c], ranks[r]};
    }
  }
  for (size_t c = channels.size(); c-- > 0;) {
    if (c + 1 < channels.size()) take_if_no_dearer(pruned_[c], pruned_[c + 1]);
    for (size_t r = rank_steps_; r-- > 0;) {
      if (r + 1 < rank_steps_) take_if_no_dearer(factored(c, r), factored(c, r + 1));
      if (c + 1 < channels.size()) take_if_no_dearer(factored(c, r), factored(c + 1, r));
    }
  }
}

Form Cost::cheapest(int64_t channels, std::optional<int64_t> rank) const {
  const Form& pruned = pruned_[step_of(channels)];
  if (!rank || step_of(*rank) >= rank_steps_) return pruned;
  const Form& split = factored(step_of(channels), step_of(*rank));
  return split.cost < pruned.cost ? split : pruned;
}

bool Cost::factoring_pays() const {
  for (size_t c = 0; rank_steps_ > 0 && c < pruned_.size(); ++c) {
    if (factored(c, 0).cost < pruned_[c].cost) return true;
  }
  return false;
}

}  // namespace cctorch::collaborative
