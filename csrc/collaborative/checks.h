#pragma once

#include <cctorch/collaborative.h>

namespace cctorch::collaborative {

// Throw c10::ValueError naming the option, or the layer, its value and what was expected.
void check_options(const Options& options);
void check_layer(const Layer& layer);

}  // namespace cctorch::collaborative
