#pragma once

#include <cctorch/collaborative.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "csrc/collaborative/running_layer.h"

namespace cctorch::collaborative {

// One step of the multi-step heuristic: ranks what remains and removes the best step_fraction of the layer's units.
// False where nothing is left to remove.
bool remove_best_units(RunningLayer& layer, const Options& options);

// The way down of the multi-step heuristic. A higher rate goes further on the same way, so one walk serves all rates.
struct RemovalPath {
  struct Step {
    int64_t channels_gone;
    std::optional<int64_t> rank;  // absent where no singular value went
    int64_t macs;                 // per output position
    int64_t pruned_macs;          // with the channels' removal alone
  };
  std::vector<int64_t> order;  // channels, as they go
  std::vector<Step> steps;     // the first is the dense layer
};

// Removes units until the dense layer has given up `rate` of its multiply-accumulates.
RemovalPath removal_path(RunningLayer layer, double rate, const Options& options);

// The first step that has given up `rate`, or the last one.
LayerPlan plan_at(const LayerSpec& spec, const RemovalPath& path, double rate, const Options& options);

}  // namespace cctorch::collaborative
