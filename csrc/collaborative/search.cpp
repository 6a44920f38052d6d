#include <c10/util/Exception.h>
#include <cctorch/collaborative.h>

#include <chrono>
#include <optional>
#include <utility>

#include "csrc/collaborative/checks.h"
#include "csrc/collaborative/choices.h"
#include "csrc/collaborative/cost.h"
#include "csrc/collaborative/for_each_layer.h"
#include "csrc/collaborative/heuristic.h"
#include "csrc/collaborative/matrix.h"
#include "csrc/collaborative/rate.h"
#include "csrc/collaborative/running_layer.h"

namespace cctorch::collaborative {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

struct Search::State {
  std::vector<Layer> layers;
  double model_cost;
  Options options;
  double curve_seconds = 0.0;
  double heuristic_seconds = 0.0;
  std::vector<RateCurve> curves = {};
  std::vector<RemovalPath> paths = {};
  std::vector<LayerChoices> choices = {};  // in place of curves and paths, where costs come in tables or multiples

  std::vector<RateCurve> allocated(double target, double& lambda) const {
    std::vector<RateCurve> result = curves;
    Options along = options;
    along.target = target;
    lambda = allocate(result, layers, model_cost, along);
    return result;
  }

  RunningLayer running(const Layer& layer) const {
    return {as_matrix(layer.weight, layer.spec, options), as_matrix(layer.gradient, layer.spec, options), options};
  }

  void follow_choices(const Progress& progress) {
    if (options.budget != Budget::table) {
      for (Layer& layer : layers) {
        layer.table = counted_costs(as_matrix(layer.spec, options), options.budget, options.multiple);
      }
    }
    const auto start = Clock::now();
    choices = layer_choices(layers, options, progress);
    heuristic_seconds = seconds_since(start);
  }

  void follow_paths(const Progress& progress) {
    TORCH_CHECK_VALUE(!layers.empty(), "compress: the model has no layer that can be compressed");
    int64_t total = 0;
    for (const Layer& layer : layers) {
      check_layer(layer, options);
      total += in_unit(options.budget, layer.spec, layer.spec.macs());
    }
    TORCH_CHECK_VALUE(model_cost >= static_cast<double>(total), "compress: model_cost = ", model_cost, " ",
                      to_string(options.budget), ", but the layers alone have ", total);
    curves.resize(layers.size());
    paths.resize(layers.size());
    auto start = Clock::now();
    std::vector<std::optional<RunningLayer>> dense(layers.size());  // the wide ones, as decomposed for the curve
    const Streams streams = streams_of(layers, options);
    for_each_layer(layers, streams, "rate optimization", options, progress, [&](size_t l) {
      RunningLayer layer = running(layers[l]);
      curves[l] = rate_curve(layers[l].spec.name, layer, of_layer(layers[l].spec, options));
      if (layer.share() > 0) dense[l] = std::move(layer);
    });
    double lambda = 0;
    const std::vector<RateCurve> highest = allocated(options.target, lambda);
    curve_seconds = seconds_since(start);
    start = Clock::now();
    for_each_layer(layers, streams, "multi-step heuristic", options, progress, [&](size_t l) {
      if (!dense[l]) dense[l] = running(layers[l]);
      paths[l] = removal_path(std::move(*dense[l]), highest[l].allocated, of_layer(layers[l].spec, options));
      dense[l].reset();
    });
    heuristic_seconds = seconds_since(start);
  }

  Solution by_paths(double target) const {
    Solution solution;
    solution.plan.method = "collaborative";
    solution.plan.target = target;
    solution.curves = allocated(target, solution.lambda);
    for (size_t l = 0; l < layers.size(); ++l) {
      const RateCurve& curve = solution.curves[l];
      if (!(curve.b > 0)) solution.warnings.push_back(left_alone(curve.name, curve.loss));
      solution.plan.layers.push_back(plan_at(layers[l].spec, paths[l], curve.allocated, options));
    }
    solution.plan.validate();
    return solution;
  }
};

Search::Search(std::vector<Layer> layers, double model_cost, const Options& options, const Progress& progress) {
  check_options(options);
  const auto state = std::make_shared<State>(State{std::move(layers), model_cost, options});
  if (options.budget == Budget::table || options.multiple > 1) {
    state->follow_choices(progress);
  } else {
    state->follow_paths(progress);
  }
  state_ = state;
}

Solution Search::at(double target) const {
  TORCH_CHECK_VALUE(0 < target && target <= state_->options.target, "Search: target = ", target,
                    ", expected above 0 and at most the ", state_->options.target, " that was searched for");
  Solution solution =
      state_->choices.empty() ? state_->by_paths(target) : select(state_->choices, state_->model_cost, target);
  solution.curve_seconds = state_->curve_seconds;
  solution.heuristic_seconds = state_->heuristic_seconds;
  return solution;
}

Solution Search::at_final(double target, const std::vector<LayerSpec>& model, const ChannelGraph& graph) const {
  const Budget budget = state_->options.budget;
  TORCH_CHECK_VALUE(budget != Budget::table, "Search: filters have no price in a table, expected another budget");
  const auto enough = static_cast<int64_t>((1.0 - target) * static_cast<double>(remaining(model, {}, budget, true)));
  const auto reaches = [&](CompressionPlan plan) {
    graph.resolve(plan);
    drop_idle_ranks(model, plan);
    return remaining(model, plan, budget, true) <= enough;
  };
  double low = 0, high = target;
  Solution best = at(target);
  for (int iteration = 0; iteration < 20; ++iteration) {
    const double middle = 0.5 * (low + high);
    Solution solution = at(middle);
    if (reaches(solution.plan)) {
      best = std::move(solution);
      high = middle;
    } else {
      low = middle;
    }
  }
  best.plan.target = target;
  return best;
}

int64_t remaining(const std::vector<LayerSpec>& model, const CompressionPlan& plan, Budget budget, bool final) {
  TORCH_CHECK_VALUE(budget != Budget::table, "remaining: a table has no closed form, expected another budget");
  int64_t sum = 0;
  for (LayerSpec spec : model) {
    // A weight has its parameters once, however many positions a kernel before the stride computes.
    if (budget != Budget::macs) spec.stride_height = spec.stride_width = 1;
    sum += in_unit(budget, spec, layer_macs(spec, plan.find(spec.name), final));
  }
  return sum;
}

}  // namespace cctorch::collaborative
