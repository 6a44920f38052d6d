#pragma once

#include <cctorch/collaborative.h>

#include <string>
#include <string_view>
#include <vector>

#include "csrc/collaborative/running_layer.h"

namespace cctorch::collaborative {

std::string_view to_string(Budget budget);

// Divides the losses by the largest and fits loss ~ a exp(b rate), weighted by the root of the loss. Leaves a = b = 0
// where no rising exponential fits.
void fit_exponential(RateCurve& curve);

// Loss against rate while a layer's units go, at most a hundredth of them between two points, the least harmful first,
// and the exponential fitted to it. The fit has b = 0 where the loss does not respond to the layer, or rises nowhere.
// `dense` is decomposed if it was not; what is removed is removed from a copy.
RateCurve rate_curve(std::string name, RunningLayer& dense, const Options& options);

// The highest rate that removing units can, and may, bring a layer to.
double highest_rate(const Layer& layer, const Options& options);

// Eq. (E2): sets `allocated` of every curve so that sum F_l c_l = target * model_cost; returns lambda.
double allocate(std::vector<RateCurve>& curves, const std::vector<Layer>& layers, double model_cost,
                const Options& options);

}  // namespace cctorch::collaborative
