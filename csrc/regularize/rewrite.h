#pragma once

#include <cctorch/regularizers.h>

namespace cctorch::regularize {

// Does what is left to do, elsewhere: the value is then Q's.
void finish(Weight& weight);

// Does what is left to do where the parameters, whose memory is that of the weights' values, lie. Returns how far they
// moved: the sum of squares, the same for any number of threads.
double rewrite_in_place(const std::vector<Weight>& weights, const NamedParameters& parameters);

}  // namespace cctorch::regularize
