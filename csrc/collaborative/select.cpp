#include <c10/util/Exception.h>
#include <cctorch/collaborative.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "csrc/collaborative/choices.h"
#include "csrc/collaborative/rate.h"

namespace cctorch::collaborative {

namespace {

using Selection = std::vector<size_t>;  // the index of each layer's choice

double dense_cost(const LayerChoices& layer) { return layer.choices.front().cost; }

double objective(const LayerChoices& layer, size_t choice) { return layer.objective(layer.choices[choice].loss); }

double removed(const std::vector<LayerChoices>& layers, const Selection& selection) {
  double sum = 0;
  for (size_t l = 0; l < layers.size(); ++l) sum += dense_cost(layers[l]) - layers[l].choices[selection[l]].cost;
  return sum;
}

// The minimum of objective + multiplier * cost, layer by layer.
Selection at_multiplier(const std::vector<LayerChoices>& layers, double multiplier) {
  Selection selection(layers.size(), 0);
  for (size_t l = 0; l < layers.size(); ++l) {
    const auto total = [&](size_t c) { return objective(layers[l], c) + multiplier * layers[l].choices[c].cost; };
    for (size_t c = 1; c < layers[l].choices.size(); ++c) {
      if (total(c) < total(selection[l])) selection[l] = c;
    }
  }
  return selection;
}

// The multiplier finds points of the convex hull only: what it removed in excess goes back where that helps most.
void give_back(const std::vector<LayerChoices>& layers, double budget, Selection& selection) {
  for (;;) {
    const double excess = removed(layers, selection) - budget;
    double most = 0;
    size_t layer = 0, choice = 0;
    for (size_t l = 0; l < layers.size(); ++l) {
      for (size_t c = 0; c < selection[l]; ++c) {
        const double cost = layers[l].choices[c].cost - layers[l].choices[selection[l]].cost;
        const double gain = objective(layers[l], selection[l]) - objective(layers[l], c);
        if (cost <= excess && gain > most) std::tie(most, layer, choice) = std::tuple(gain, l, c);
      }
    }
    if (!(most > 0)) return;
    selection[layer] = choice;
  }
}

RateCurve curve_of(const LayerChoices& layer, size_t chosen) {
  RateCurve curve;
  curve.name = layer.name;
  const auto rate = [&](const Choice& choice) { return 1.0 - choice.cost / dense_cost(layer); };
  for (size_t c = 1; c < layer.choices.size(); ++c) {
    curve.rate.push_back(rate(layer.choices[c]));
    curve.loss.push_back(layer.choices[c].loss);
  }
  fit_exponential(curve);
  curve.allocated = rate(layer.choices[chosen]);
  return curve;
}

}  // namespace

// (E1) is a sum of squared changes of the loss: its root is in the loss's own unit, as the importance.
double LayerChoices::objective(double loss) const {
  if (!(largest_loss > 0)) return 0.0;
  const double share = loss / largest_loss;
  if (importance > 0) return importance * std::sqrt(share);
  return (cost_before > 0 ? cost_before : dense_cost(*this)) * share;
}

Solution select(const std::vector<LayerChoices>& layers, double model_cost, double target) {
  double reachable = 0, total = 0;
  const auto has_importance = [](const LayerChoices& layer) { return layer.importance > 0; };
  const auto weighed = std::ranges::count_if(layers, has_importance);
  TORCH_CHECK_VALUE(weighed == 0 || std::cmp_equal(weighed, layers.size()), "compress: ", weighed, " of the ",
                    layers.size(), " layers have an importance above 0, expected all or none");
  for (const LayerChoices& layer : layers) {
    TORCH_CHECK_VALUE(!layer.choices.empty(), "compress: layer '", layer.name, "' has no choices");
    total += dense_cost(layer);
    reachable += dense_cost(layer) - layer.choices.back().cost;
  }
  TORCH_CHECK_VALUE(target > 0 && target < 1, "compress: target = ", target, ", expected above 0 and below 1");
  TORCH_CHECK_VALUE(model_cost >= total * (1 - 1e-9), "compress: model_cost = ", model_cost,
                    ", but the layers alone cost ", total);
  const double budget = target * model_cost;
  TORCH_CHECK_VALUE(budget <= reachable, "compress: target = ", target, " cannot be reached: the ", layers.size(),
                    " compressible layers can give up ", reachable / model_cost,
                    " of the model's cost; lower the target or leave fewer layers out");

  double low = 0, high = 1;
  while (removed(layers, at_multiplier(layers, high)) < budget && high < 1e30) high *= 2;
  for (int iteration = 0; iteration < 100; ++iteration) {
    const double middle = 0.5 * (low + high);
    (removed(layers, at_multiplier(layers, middle)) < budget ? low : high) = middle;
  }
  Selection selection = at_multiplier(layers, high);
  give_back(layers, budget, selection);

  Solution solution;
  solution.plan.method = "collaborative";
  solution.plan.target = target;
  solution.lambda = high;
  for (size_t l = 0; l < layers.size(); ++l) {
    solution.losses.push_back(layers[l].choices[selection[l]].loss);
    solution.plan.layers.push_back(layers[l].choices[selection[l]].plan);
    solution.curves.push_back(curve_of(layers[l], selection[l]));
    if (!(layers[l].largest_loss > 0)) solution.warnings.push_back(left_alone(layers[l].name, {}));
  }
  solution.plan.validate();
  return solution;
}

}  // namespace cctorch::collaborative
