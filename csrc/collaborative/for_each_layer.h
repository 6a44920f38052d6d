#pragma once

#include <cctorch/collaborative.h>

#include <algorithm>
#include <mutex>
#include <string_view>
#include <vector>

#include "csrc/largest_first.h"

namespace cctorch::collaborative {

// Layers are independent of each other.
template <class Function>
void for_each_layer(const std::vector<Layer>& layers, std::string_view stage, const Progress& progress,
                    const Function& function) {
  std::vector<double> costs;
  for (const Layer& layer : layers) {
    const LayerSpec& spec = layer.spec;
    costs.push_back(
        static_cast<double>(spec.parameters() * std::min(spec.out_channels, spec.in_channels * spec.kernel_size()) *
                            (spec.in_channels + spec.out_channels)));
  }
  std::mutex report;
  int64_t done = 0;
  const auto total = static_cast<int64_t>(layers.size());
  if (progress) progress(stage, 0, total);
  largest_first(costs, [&](size_t layer) {
    function(layer);
    const std::scoped_lock lock(report);
    if (progress) progress(stage, ++done, total);
  });
}

}  // namespace cctorch::collaborative
