#include "csrc/collaborative/for_each_layer.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <mutex>
#include <numeric>

#include "csrc/collaborative/running_layer.h"
#include "csrc/largest_first.h"

namespace cctorch::collaborative {

void for_each_layer(const std::vector<Layer>& layers, std::string_view stage, const Options& options,
                    const Progress& progress, const std::function<void(size_t layer)>& function) {
  std::vector<double> costs;
  for (const Layer& layer : layers) {
    const LayerSpec& spec = layer.spec;
    const int64_t inputs = spec.in_channels * spec.kernel_size();
    costs.push_back(ranking_macs(inputs, spec.out_channels, std::min(inputs, spec.out_channels)));
  }
  std::vector<size_t> order(layers.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return costs[a] > costs[b]; });

  std::mutex report;
  int64_t done = 0;
  const auto total = static_cast<int64_t>(layers.size());
  if (progress) progress(stage, 0, total);
  const auto work = [&](size_t layer) {
    function(layer);
    const std::scoped_lock lock(report);
    if (progress) progress(stage, ++done, total);
  };

  double rest = std::accumulate(costs.begin(), costs.end(), 0.0);
  auto next = order.begin();
  for (; next != order.end(); ++next) {
    const double cost = costs[*next];
    if (!(ranking_share(cost, options) > 0 && cost * at::get_num_threads() > rest)) break;
    largest_first({cost}, [&](size_t) { work(*next); });
    rest -= cost;
  }
  std::vector<double> shared;
  std::for_each(next, order.end(), [&](size_t layer) { shared.push_back(costs[layer]); });
  largest_first(shared, [&](size_t i) { work(next[static_cast<std::ptrdiff_t>(i)]); });
}

}  // namespace cctorch::collaborative
