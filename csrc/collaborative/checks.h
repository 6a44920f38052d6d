#pragma once

#include <cctorch/collaborative.h>

namespace cctorch::collaborative {

// Throw c10::ValueError naming the option, or the layer, its value and what was expected.
void check_options(const Options& options);
void check_layer(const Layer& layer, const Options& options);

// What the options mean for one layer: a weight of an lstm gives up singular values alone.
Options of_layer(const LayerSpec& spec, const Options& options);

}  // namespace cctorch::collaborative
