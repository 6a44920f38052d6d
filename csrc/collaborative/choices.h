#pragma once

#include <cctorch/collaborative.h>

#include <string>
#include <vector>

namespace cctorch::collaborative {

// The forms that the multi-step heuristic passes on its way down, each of them rounded up to the largest counts of its
// cost, and of these the ones that no other beats in both cost and loss.
LayerChoices removal_choices(const Layer& layer, const Options& options);

// The warning about a layer that is not searched, by the losses of its removals.
std::string left_alone(const std::string& layer, const std::vector<double>& losses);

}  // namespace cctorch::collaborative
