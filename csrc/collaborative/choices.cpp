#include "csrc/collaborative/choices.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "csrc/collaborative/checks.h"
#include "csrc/collaborative/cost.h"
#include "csrc/collaborative/for_each_layer.h"
#include "csrc/collaborative/heuristic.h"
#include "csrc/collaborative/matrix.h"
#include "csrc/collaborative/running_layer.h"

namespace cctorch::collaborative {

namespace {

// The last channels to go were the most valuable: they come back first.
LayerPlan plan_of(const Layer& layer, const RunningLayer& running, const Form& form, const Options& options) {
  const LayerSpec& spec = layer.spec;
  LayerPlan plan = LayerPlan::unchanged(spec.name, spec.kind, spec.in_channels, spec.out_channels);
  plan.kept_in = running.kept_channels();
  const std::vector<int64_t>& removed = running.removed_channels();
  const int64_t returning = form.channels - static_cast<int64_t>(plan.kept_in.size());
  plan.kept_in.insert(plan.kept_in.end(), removed.end() - returning, removed.end());
  std::sort(plan.kept_in.begin(), plan.kept_in.end());
  if (form.rank) {
    plan.rank = std::min({*form.rank, running.outputs(), form.channels * running.kernel_size()});
    plan.layout = low_rank_layout(spec, options.layout);
  }
  return plan;
}

// (E1) of the weight that the plan leaves: the truncated SVD of the original weight's kept channels.
double loss_of(RunningLayer running, const LayerPlan& plan) {
  std::vector<int64_t> removed;
  for (int64_t channel = 0; channel < running.channels(); ++channel) {
    if (!std::binary_search(plan.kept_in.begin(), plan.kept_in.end(), channel)) removed.push_back(channel);
  }
  running.remove_channels(removed);
  if (plan.rank && *plan.rank < running.rank()) {
    std::vector<int64_t> smallest(running.rank() - *plan.rank);
    std::iota(smallest.begin(), smallest.end(), *plan.rank);
    running.remove_values(smallest);
  }
  return running.loss();
}

void walk_down(const Layer& layer, const RunningLayer& dense, const Cost& cost, const Options& options,
               std::vector<Choice>& choices) {
  RunningLayer running = dense;
  const double floor = (1.0 - std::min(options.max_rate, layer.max_rate)) * cost.dense();
  double last = cost.dense();
  while (remove_best_units(running, options)) {
    const std::optional<int64_t> rank = running.decomposed() ? std::optional(running.rank()) : std::nullopt;
    const Form form = cost.cheapest(running.channels_left(), rank);
    if (form.cost < floor) return;
    if (!(form.cost < last)) continue;
    last = form.cost;
    LayerPlan plan = plan_of(layer, running, form, options);
    // A wide layer would be decomposed once more for it. What it has lost so far is about what it loses when deployed.
    const double loss = dense.share() > 0 ? running.loss() : loss_of(dense, plan);
    choices.push_back({form.cost, loss, std::move(plan)});
  }
}

void keep_unbeaten(std::vector<Choice>& choices) {
  std::stable_sort(choices.begin(), choices.end(), [](const Choice& a, const Choice& b) {
    return a.cost < b.cost || (a.cost == b.cost && a.loss < b.loss);
  });
  double lowest = std::numeric_limits<double>::infinity();
  std::erase_if(choices, [&](const Choice& choice) {
    if (!(choice.loss < lowest)) return true;
    lowest = choice.loss;
    return false;
  });
  std::reverse(choices.begin(), choices.end());
}

}  // namespace

std::string left_alone(const std::string& layer, const std::vector<double>& losses) {
  const bool responds = std::any_of(losses.begin(), losses.end(), [](double loss) { return loss > 0; });
  return "layer '" + layer + "' is left alone: " +
         (responds ? "its loss does not rise with its rate; it may have too few units"
                   : "the loss does not respond to its weights");
}

LayerChoices removal_choices(const Layer& layer, const Options& options) {
  const LayerSpec& spec = layer.spec;
  const Cost cost(as_matrix(spec, options), layer.table);
  const RunningLayer dense(as_matrix(layer.weight, spec, options), as_matrix(layer.gradient, spec, options), options);
  LayerChoices found{spec.name, dense.largest_loss(), layer.importance, {}, layer.cost_before};
  found.choices.push_back(
      {cost.dense(), 0.0, LayerPlan::unchanged(spec.name, spec.kind, spec.in_channels, spec.out_channels)});
  if (!(found.largest_loss > 0)) return found;
  // Mixed removals that end as a merely pruned layer chose its channels with a decomposition in mind: pruning alone is
  // a way of its own.
  std::vector<Units> ways;
  if (options.units != Units::singular_values) ways.push_back(Units::channels);
  if (options.units != Units::channels && cost.factoring_pays()) ways.push_back(options.units);
  for (const Units way : ways) {
    Options along = options;
    along.units = way;
    walk_down(layer, dense, cost, along, found.choices);
  }
  if (layer.table.removed && layer.max_rate == 1) {
    LayerPlan none = found.choices.front().plan;
    none.kept_in.clear();
    found.choices.push_back({*layer.table.removed, found.largest_loss, std::move(none)});
  }
  keep_unbeaten(found.choices);
  found.largest_loss += layer.lost;
  for (Choice& choice : found.choices) choice.loss += layer.lost;
  return found;
}

std::vector<LayerChoices> layer_choices(const std::vector<Layer>& layers, const Options& options,
                                        const Progress& progress) {
  check_options(options);
  TORCH_CHECK_VALUE(!layers.empty(), "compress: the model has no layer that can be compressed");
  for (const Layer& layer : layers) check_layer(layer, options);
  std::vector<LayerChoices> choices(layers.size());
  for_each_layer(layers, streams_of(layers, options), "multi-step heuristic", options, progress,
                 [&](size_t l) { choices[l] = removal_choices(layers[l], of_layer(layers[l].spec, options)); });
  return choices;
}

}  // namespace cctorch::collaborative
