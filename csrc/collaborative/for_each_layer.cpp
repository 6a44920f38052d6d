#include "csrc/collaborative/for_each_layer.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <mutex>
#include <numeric>
#include <utility>

#include "csrc/collaborative/matrix.h"
#include "csrc/collaborative/running_layer.h"
#include "csrc/largest_first.h"

namespace cctorch::collaborative {

namespace {

// PyTorch loads its linear algebra for a GPU at the first use, and fails where two threads are first.
void load_linear_algebra(const at::Device& device) {
  at::linalg_eigh(at::ones({1, 1}, at::device(device).dtype(at::kDouble)));
}

}  // namespace

Streams streams_of(const std::vector<Layer>& layers, const Options& options) {
  Streams streams;
  bool loaded = false;
  for (const Layer& layer : layers) {
    std::optional<c10::Stream>& stream = streams.emplace_back();
    if (!layer.weight.is_cuda() || !(ranking_share(ranking_macs(as_matrix(layer.spec, options)), options) > 0))
      continue;
    const c10::impl::VirtualGuardImpl device(layer.weight.device().type());
    for (const at::Tensor* read : {&layer.weight, &layer.gradient}) {
      if (read->is_cuda()) device.getStream(read->device()).synchronize();
    }
    if (!std::exchange(loaded, true)) load_linear_algebra(layer.weight.device());
    stream = device.getStreamFromGlobalPool(layer.weight.device());
  }
  return streams;
}

void for_each_layer(const std::vector<Layer>& layers, const Streams& streams, std::string_view stage,
                    const Options& options, const Progress& progress,
                    const std::function<void(size_t layer)>& function) {
  std::vector<double> costs;
  for (const Layer& layer : layers) costs.push_back(ranking_macs(as_matrix(layer.spec, options)));
  std::vector<size_t> order(layers.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return costs[a] > costs[b]; });

  std::mutex report;
  int64_t done = 0;
  const auto total = static_cast<int64_t>(layers.size());
  if (progress) progress(stage, 0, total);
  const auto work = [&](size_t layer) {
    {
      const c10::OptionalStreamGuard aside(streams[layer]);
      const at::NoTF32Guard in_float32;
      function(layer);
    }
    const std::scoped_lock lock(report);
    if (progress) progress(stage, ++done, total);
  };

  const auto on_processor = std::stable_partition(order.begin(), order.end(), [&](size_t l) { return !!streams[l]; });
  double rest = 0;
  std::for_each(on_processor, order.end(), [&](size_t l) { rest += costs[l]; });
  auto next = on_processor;
  for (; next != order.end(); ++next) {
    const double cost = costs[*next];
    if (ranking_share(cost, options) <= 0 || cost * at::get_num_threads() <= rest) break;
    largest_first({cost}, [&](size_t) { work(*next); });
    rest -= cost;
  }
  order.erase(on_processor, next);
  std::vector<double> shared;
  for (const size_t layer : order) shared.push_back(costs[layer]);
  largest_first(shared, [&](size_t i) { work(order[i]); });
}

}  // namespace cctorch::collaborative
