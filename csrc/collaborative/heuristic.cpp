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

// One ranking's removals: singular values first, all by the spectrum they were scored on, then channels. One of each
// kind stays.
void remove_units(RunningLayer& layer, const std::vector<int64_t>& units) {
  std::vector<int64_t> channels, values;
  for (const int64_t unit : units) {
    const bool is_channel = unit < layer.channels();
    std::vector<int64_t>& kind = is_channel ? channels : values;
    const int64_t left = is_channel ? layer.channels_left() : layer.rank();
    if (static_cast<int64_t>(kind.size()) + 1 < left) kind.push_back(is_channel ? unit : unit - layer.channels());
  }
  if (!values.empty()) layer.remove_values(values);
  layer.remove_channels(channels);
}

double goal_of(const RemovalPath& path, double rate) {
  return (1.0 - rate) * static_cast<double>(path.steps.front().macs) * (1 + 1e-12);
}

bool reaches(const RemovalPath::Step& step, double goal) {
  return static_cast<double>(std::min(step.macs, step.pruned_macs)) <= goal;
}

}  // namespace

bool remove_best_units(RunningLayer& layer, const Options& options) {
  const auto step = static_cast<int64_t>(options.step_fraction * static_cast<double>(layer.units(options.units)));
  const std::vector<int64_t> units = best_units(layer.scores(options), std::max<int64_t>(step, 1));
  if (!units.empty()) remove_units(layer, units);
  return !units.empty();
}

RemovalPath removal_path(const Layer& layer, double rate, const Options& options) {
  const LayerSpec& spec = layer.spec;
  const int64_t dense = spec.out_channels * spec.in_channels * spec.kernel_size();
  RemovalPath path{{}, {{0, std::nullopt, dense, dense}}};
  if (!(rate > 0)) return path;
  RunningLayer running(layer.weight, layer.gradient, options.basis);
  const double goal = goal_of(path, rate);
  while (!reaches(path.steps.back(), goal) && remove_best_units(running, options)) {
    path.steps.push_back({static_cast<int64_t>(running.removed_channels().size()),
                          running.decomposed() ? std::optional(running.rank()) : std::nullopt, running.macs(),
                          running.pruned_macs()});
  }
  path.order = running.removed_channels();
  return path;
}

LayerPlan plan_at(const LayerSpec& spec, const RemovalPath& path, double rate) {
  const double goal = goal_of(path, rate);
  const auto reached = std::find_if(path.steps.begin(), path.steps.end(),
                                    [&](const RemovalPath::Step& step) { return reaches(step, goal); });
  const RemovalPath::Step& step = reached == path.steps.end() ? path.steps.back() : *reached;
  LayerPlan plan = LayerPlan::unchanged(spec.name, spec.kind, spec.in_channels, spec.out_channels);
  const std::set<int64_t> gone(path.order.begin(), path.order.begin() + step.channels_gone);
  std::erase_if(plan.kept_in, [&](int64_t channel) { return gone.contains(channel); });
  // Channels alone suffice: the weight is not decomposed, and loses nothing else.
  if (step.rank && static_cast<double>(step.pruned_macs) > goal) plan.rank = step.rank;
  return plan;
}

}  // namespace cctorch::collaborative
