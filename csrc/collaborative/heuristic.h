#pragma once

#include <cctorch/collaborative.h>

#include "csrc/collaborative/running_layer.h"

namespace cctorch::collaborative {

// One step of the multi-step heuristic: ranks what remains and removes the best step_fraction of the layer's units.
// False where nothing is left to remove.
bool remove_best_units(RunningLayer& layer, const Options& options);

// The multi-step heuristic: removes units until the layer has given up `rate` of its multiply-accumulates.
LayerPlan compress_layer(const Layer& layer, double rate, const Options& options);

}  // namespace cctorch::collaborative
