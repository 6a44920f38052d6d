#pragma once

#include <cctorch/collaborative.h>

#include <vector>

namespace cctorch::collaborative {

// Loss against rate while a layer's units go one by one, the least harmful first, and the exponential fitted to it. The
// fit has b = 0 where the loss does not respond to the layer at all.
RateCurve rate_curve(const Layer& layer, Units units);

// The highest rate that removing units can bring a layer to.
double highest_rate(const LayerSpec& spec, const Options& options);

// Eq. (E2): sets `allocated` of every curve so that sum F_l c_l = target * model_macs; returns lambda.
double allocate(std::vector<RateCurve>& curves, const std::vector<LayerSpec>& specs, int64_t model_macs,
                const Options& options);

}  // namespace cctorch::collaborative
