#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <cctorch/collaborative.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <numeric>
#include <string_view>
#include <vector>

namespace cctorch::collaborative {

// Layers are independent: each thread takes the next one, the largest first, so that no thread is left with the last.
template <class Function>
void for_each_layer(const std::vector<Layer>& layers, std::string_view stage, const Progress& progress,
                    const Function& function) {
  std::vector<size_t> order(layers.size());
  std::iota(order.begin(), order.end(), 0);
  const auto cost = [&](size_t l) {
    const LayerSpec& spec = layers[l].spec;
    return spec.parameters() * std::min(spec.out_channels, spec.in_channels * spec.kernel_size()) *
           (spec.in_channels + spec.out_channels);
  };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return cost(a) > cost(b); });

  std::atomic<size_t> next{0};
  std::mutex report;
  int64_t done = 0;
  const auto total = static_cast<int64_t>(layers.size());
  if (progress) progress(stage, 0, total);
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), total), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView without_autograd;
    for (int64_t worker = begin; worker < end; ++worker) {
      try {
        for (size_t taken = next++; taken < order.size(); taken = next++) {
          function(order[taken]);
          const std::scoped_lock lock(report);
          if (progress) progress(stage, ++done, total);
        }
      } catch (...) {
        next = order.size();
        throw;
      }
    }
  });
}

}  // namespace cctorch::collaborative
