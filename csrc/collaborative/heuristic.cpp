#include "csrc/collaborative/heuristic.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>
#include <vector>

#include "csrc/collaborative/running_layer.h"

namespace cctorch::collaborative {

namespace {

// Finite scores, lowest first, at most `count`.
std::vector<int64_t> best_units(const std::vector<double>& scores, int64_t count) {
  std::vector<int64_t> units;
  for (size_t u = 0; u < scores.size(); ++u) {
    if (std::isfinite(scores[u])) units.push_back(static_cast<int64_t>(u));
  }
  std::stable_sort(units.begin(), units.end(), [&](int64_t a, int64_t b) { return scores[a] < scores[b]; });
  if (std::cmp_greater(units.size(), count)) units.resize(count);
  return units;
}

// What one ranking removes: singular values first, all by the spectrum they were scored on, then channels. One of each
// kind stays.
struct Removal {
  std::vector<int64_t> channels, values;

  void add(int64_t unit, const RunningLayer& layer) {
    const bool is_channel = unit < layer.channels();
    std::vector<int64_t>& kind = is_channel ? channels : values;
    const int64_t left = is_channel ? layer.channels_left() : layer.rank();
    if (static_cast<int64_t>(kind.size()) + 1 < left) kind.push_back(is_channel ? unit : unit - layer.channels());
  }

  void carry_out(RunningLayer& layer) const {
    if (!values.empty()) layer.remove_values(values);
    layer.remove_channels(channels);
  }

  RemovalPath::Step step(const RunningLayer& layer) const {
    const int64_t left = layer.channels_left() - static_cast<int64_t>(channels.size());
    const int64_t inputs = left * layer.kernel_size(), pruned = inputs * layer.outputs();
    const int64_t rank = std::min(layer.rank() - static_cast<int64_t>(values.size()), inputs);
    const bool factored = layer.decomposed() || !values.empty();
    return {layer.channels() - left, factored ? std::optional(rank) : std::nullopt,
            factored ? (inputs + layer.outputs()) * rank : pruned, pruned};
  }
};

int64_t units_per_ranking(const RunningLayer& layer, const Options& options) {
  const auto dense = static_cast<double>(layer.units(options.units));
  const auto left = static_cast<double>(layer.units_left(options.units));
  return std::max<int64_t>(static_cast<int64_t>(std::max(options.step_fraction * dense, layer.share() * left)), 1);
}

double goal_of(const RemovalPath& path, double rate) {
  return (1.0 - rate) * static_cast<double>(path.steps.front().macs) * (1 + 1e-12);
}

bool reaches(const RemovalPath::Step& step, double goal) {
  return static_cast<double>(std::min(step.macs, step.pruned_macs)) <= goal;
}

}  // namespace

bool remove_best_units(RunningLayer& layer, const Options& options) {
  const std::vector<int64_t> units = best_units(layer.scores(options), units_per_ranking(layer, options));
  Removal removal;
  for (const int64_t unit : units) removal.add(unit, layer);
  removal.carry_out(layer);
  return !units.empty();
}

RemovalPath removal_path(RunningLayer layer, double rate, const Options& options) {
  RemovalPath path{{}, {{0, std::nullopt, layer.dense_macs(), layer.dense_macs()}}};
  const double goal = goal_of(path, rate);
  const bool every_unit = layer.share() > 0;  // is a point of the way, where many of them go by one ranking
  while (!reaches(path.steps.back(), goal)) {
    const std::vector<int64_t> units = best_units(layer.scores(options), units_per_ranking(layer, options));
    if (units.empty()) break;
    Removal removal;
    for (size_t u = 0; u < units.size() && !reaches(path.steps.back(), goal); ++u) {
      removal.add(units[u], layer);
      if (every_unit || u + 1 == units.size()) path.steps.push_back(removal.step(layer));
    }
    removal.carry_out(layer);
  }
  path.order = layer.removed_channels();
  return path;
}

LayerPlan plan_at(const LayerSpec& spec, const RemovalPath& path, double rate, const Options& options) {
  const double goal = goal_of(path, rate);
  const auto reached = std::find_if(path.steps.begin(), path.steps.end(),
                                    [&](const RemovalPath::Step& step) { return reaches(step, goal); });
  const RemovalPath::Step& step = reached == path.steps.end() ? path.steps.back() : *reached;
  LayerPlan plan = LayerPlan::unchanged(spec.name, spec.kind, spec.in_channels, spec.out_channels);
  const std::set<int64_t> gone(path.order.begin(), path.order.begin() + step.channels_gone);
  std::erase_if(plan.kept_in, [&](int64_t channel) { return gone.contains(channel); });
  // Channels alone suffice: the weight is not decomposed, and loses nothing else.
  if (step.rank && static_cast<double>(step.pruned_macs) > goal) {
    plan.rank = step.rank;
    plan.layout = low_rank_layout(spec, options.layout);
  }
  return plan;
}

}  // namespace cctorch::collaborative
