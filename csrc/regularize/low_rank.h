#pragma once

#include <cctorch/regularizers.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "csrc/regularize/matrices.h"

namespace cctorch::regularize::low_rank {

void check_ratio(const char* who, const std::optional<double>& ratio);

struct Factored {
  int64_t entries;  // of the factors
  LowRankForm form;
};

// Those of `weights` whose factors, which `describe` describes, are smaller than they are: factored from now on.
std::vector<Weight*> factored(std::vector<Weight>& weights,
                              const std::function<Factored(const at::Tensor& weight)>& describe);

// The largest rank with rank (rows + columns) <= rows columns / ratio, at least 1.
int64_t rank_for(double ratio, int64_t rows, int64_t columns);

// Truncated SVD of weights seen as matrices; `state` remembers where the next event starts.
void truncate(const std::vector<Weight*>& weights, const Unfolding& unfolding, const std::vector<int64_t>& ranks,
              State& state);

// The bases that an event leaves for the next one, by what they are of which weight.
at::Tensor recall(const State& bases, const std::string& key, at::IntArrayRef sizes, const at::Tensor& like);

}  // namespace cctorch::regularize::low_rank
