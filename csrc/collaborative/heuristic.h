#pragma once

#include <cctorch/collaborative.h>

namespace cctorch::collaborative {

// The multi-step heuristic: removes units until the layer has given up `rate` of its multiply-accumulates.
LayerPlan compress_layer(const Layer& layer, double rate, const Options& options);

}  // namespace cctorch::collaborative
