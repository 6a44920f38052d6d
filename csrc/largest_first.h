#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

namespace cctorch {

// Calls function(i) for each cost, on as many threads as there are: each takes the next one, the dearest first, so that
// no thread is left with the last. A single one is left all threads.
template <class Function>
void largest_first(const std::vector<double>& costs, const Function& function) {
  std::vector<size_t> order(costs.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return costs[a] > costs[b]; });
  std::atomic<size_t> next{0};
  const auto workers = std::min<int64_t>(at::get_num_threads(), static_cast<int64_t>(order.size()));
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView without_autograd;
    for (int64_t worker = begin; worker < end; ++worker) {
      try {
        for (size_t taken = next++; taken < order.size(); taken = next++) function(order[taken]);
      } catch (...) {
        next = order.size();
        throw;
      }
    }
  });
}

}  // namespace cctorch
