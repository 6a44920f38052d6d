#include "csrc/collaborative/rate.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "csrc/collaborative/checks.h"
#include "csrc/collaborative/cost.h"
#include "csrc/collaborative/matrix.h"

namespace cctorch::collaborative {

namespace {

constexpr double log_offset = 1e-10;

std::vector<int64_t> removal_order(RunningLayer& layer, Units units) {
  const std::vector<double> losses = layer.losses_alone(units != Units::channels);
  std::vector<int64_t> order(losses.size());
  std::iota(order.begin(), order.end(), 0);
  if (units == Units::singular_values) order.erase(order.begin(), order.begin() + layer.channels());
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return losses[a] < losses[b]; });
  return order;
}

// Removes units in order, `step` at a time, singular values before channels, and records the joint loss and the rate
// after each step; stops with the layer empty.
void trace_removals(RunningLayer layer, const std::vector<int64_t>& order, size_t step, RateCurve& curve) {
  const auto dense = static_cast<double>(layer.dense_macs());
  std::vector<int64_t> values_gone;  // by their place in the dense weight's spectrum, sorted
  for (size_t begin = 0, end = 0; begin < order.size(); begin = end) {
    const auto shared = static_cast<size_t>(layer.share() * static_cast<double>(order.size()));
    end = std::min(begin + std::max(step, shared), order.size());
    std::vector<int64_t> channels, values;
    for (size_t u = begin; u < end; ++u) {
      const bool is_channel = order[u] < layer.channels();
      (is_channel ? channels : values).push_back(is_channel ? order[u] : order[u] - layer.channels());
    }
    // The spectrum has since lost values: what was value i is now further to the front.
    const auto index_now = [&](int64_t value) {
      return value - (std::lower_bound(values_gone.begin(), values_gone.end(), value) - values_gone.begin());
    };
    std::vector<int64_t> indices;
    for (const int64_t value : values) {
      if (index_now(value) < layer.rank()) indices.push_back(index_now(value));
    }
    if (!indices.empty()) layer.remove_values(indices);
    layer.remove_channels(channels);
    values_gone.insert(values_gone.end(), values.begin(), values.end());
    std::sort(values_gone.begin(), values_gone.end());

    const double rate = 1.0 - static_cast<double>(layer.macs()) / dense;
    if (rate > 0) {
      curve.rate.push_back(rate);
      curve.loss.push_back(layer.loss());
    }
    if (layer.channels_left() == 0 || layer.rank() == 0) return;
  }
}

}  // namespace

std::string_view to_string(Budget budget) {
  switch (budget) {
    case Budget::macs:
      return "multiply-accumulates";
    case Budget::parameters:
      return "parameters";
    case Budget::bytes:
      return "bytes";
    case Budget::table:
      break;
  }
  return "cost";
}

void fit_exponential(RateCurve& curve) {
  const double largest = curve.loss.empty() ? 0.0 : *std::max_element(curve.loss.begin(), curve.loss.end());
  if (!(largest > 0)) return;
  double weights = 0, mean_rate = 0, mean_log = 0;
  for (size_t i = 0; i < curve.loss.size(); ++i) {
    curve.loss[i] /= largest;
    const double weight = std::sqrt(curve.loss[i]);
    weights += weight;
    mean_rate += weight * curve.rate[i];
    mean_log += weight * std::log(curve.loss[i] + log_offset);
  }
  mean_rate /= weights;
  mean_log /= weights;
  double covariance = 0, variance = 0;
  for (size_t i = 0; i < curve.loss.size(); ++i) {
    const double weight = std::sqrt(curve.loss[i]);
    const double offset = curve.rate[i] - mean_rate;
    covariance += weight * offset * (std::log(curve.loss[i] + log_offset) - mean_log);
    variance += weight * offset * offset;
  }
  if (!(variance > 0) || !(covariance > 0)) return;
  curve.b = covariance / variance;
  curve.a = std::exp(mean_log - curve.b * mean_rate);
}

RateCurve rate_curve(std::string name, RunningLayer& dense, const Options& options) {
  RateCurve curve;
  curve.name = std::move(name);
  const std::vector<int64_t> order = removal_order(dense, options.units);
  // However coarse the heuristic may be: a fit needs points.
  const double fraction = std::min(options.step_fraction, Options{}.step_fraction);
  const auto step = static_cast<size_t>(fraction * static_cast<double>(order.size()));
  trace_removals(dense, order, std::max<size_t>(step, 1), curve);
  fit_exponential(curve);
  return curve;
}

double highest_rate(const Layer& layer, const Options& options) {
  const LayerSpec spec = as_matrix(layer.spec, options);
  const int64_t k = spec.kernel_size();
  const auto dense = static_cast<double>(spec.out_channels * spec.in_channels * k);
  const int64_t channels = options.units == Units::singular_values ? spec.in_channels : 1;
  int64_t smallest = spec.out_channels * channels * k;
  if (options.units != Units::channels) smallest = std::min(smallest, channels * k + spec.out_channels);
  return std::clamp(1.0 - static_cast<double>(smallest) / dense, 0.0, std::min(options.max_rate, layer.max_rate));
}

double allocate(std::vector<RateCurve>& curves, const std::vector<Layer>& layers, double model_cost,
                const Options& options) {
  std::vector<double> highest(curves.size());
  std::vector<double> cost;
  for (const Layer& layer : layers) {
    cost.push_back(static_cast<double>(in_unit(options.budget, layer.spec, layer.spec.macs())));
  }
  double low = std::numeric_limits<double>::infinity(), high = -low, reachable = 0;
  for (size_t l = 0; l < curves.size(); ++l) {
    if (!(curves[l].b > 0)) continue;
    highest[l] = highest_rate(layers[l], of_layer(layers[l].spec, options));
    const double log_at_zero = std::log(curves[l].a * curves[l].b);
    low = std::min(low, log_at_zero);
    high = std::max(high, log_at_zero + curves[l].b * highest[l]);
    reachable += cost[l] * highest[l];
  }
  const double budget = options.target * model_cost;
  TORCH_CHECK_VALUE(budget <= reachable, "compress: target = ", options.target, " cannot be reached: with at most ",
                    options.max_rate, " of each layer removed, or its bound, the ", layers.size(),
                    " compressible layers can give up ", reachable / model_cost, " of the model's ",
                    to_string(options.budget), "; lower the target or leave fewer layers out");

  const auto allocation = [&](double log_lambda, size_t l) {
    if (!(curves[l].b > 0)) return 0.0;
    return std::clamp((log_lambda - std::log(curves[l].a * curves[l].b)) / curves[l].b, 0.0, highest[l]);
  };
  for (int iteration = 0; iteration < 200; ++iteration) {
    const double middle = 0.5 * (low + high);
    double removed = 0;
    for (size_t l = 0; l < curves.size(); ++l) removed += cost[l] * allocation(middle, l);
    (removed < budget ? low : high) = middle;
  }
  for (size_t l = 0; l < curves.size(); ++l) curves[l].allocated = allocation(high, l);
  return std::exp(high);
}

}  // namespace cctorch::collaborative
