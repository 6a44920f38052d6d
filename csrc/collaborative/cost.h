#pragma once

#include <cctorch/collaborative.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace cctorch::collaborative {

// A form of a layer by its counts; no rank: not factored.
struct Form {
  double cost = 0.0;
  int64_t channels = 0;
  std::optional<int64_t> rank;
};

// A layer's multiply-accumulates, under any plan, in the unit of a budget that has a closed form.
int64_t in_unit(Budget budget, const LayerSpec& spec, int64_t macs);

// The same of all forms of a layer, in steps of `multiple`; both are linear in each count, so the ends suffice.
CostTable counted_costs(const LayerSpec& spec, Budget budget, int64_t multiple);

// A CostTable between its points. Counts go in steps of the table's multiple.
class Cost {
 public:
  // Throws c10::ValueError naming the layer where the table does not fit it.
  Cost(const LayerSpec& spec, const CostTable& table);

  double dense() const { return dense_; }

  // The cheapest form of at least these counts, with the largest counts of that cost. Without a rank the layer is not
  // factored; with one it may be, where that is cheaper than pruning to these channels alone.
  Form cheapest(int64_t channels, std::optional<int64_t> rank) const;

  // Whether a factored layer is anywhere cheaper than one pruned to the same channels.
  bool factoring_pays() const;

 private:
  Form& factored(size_t channel_step, size_t rank_step) { return factored_[channel_step * rank_steps_ + rank_step]; }
  const Form& factored(size_t channel_step, size_t rank_step) const {
    return factored_[channel_step * rank_steps_ + rank_step];
  }
  size_t step_of(int64_t count) const { return static_cast<size_t>((count - 1) / multiple_); }

  int64_t multiple_;
  double dense_;
  size_t rank_steps_ = 0;
  std::vector<Form> pruned_;    // of each step of channels
  std::vector<Form> factored_;  // of each step of channels and of ranks, row-major
};

}  // namespace cctorch::collaborative
