#include <ATen/core/Tensor.h>
#include <cctorch/regularizers.h>

#include <algorithm>

#include "csrc/regularize/rewrite.h"
#include "csrc/regularize/state.h"

namespace cctorch::regularize {

Compose::Compose(std::vector<std::shared_ptr<Regularizer>> parts) : parts_(std::move(parts)) {
  TORCH_CHECK_VALUE(!parts_.empty(), "Compose: expected at least one regularizer, got none");
  for (const auto& part : parts_) TORCH_CHECK_VALUE(part, "Compose: a part is null, expected a regularizer");
}

bool Compose::acts_on(const at::Tensor& parameter) const {
  return std::any_of(parts_.begin(), parts_.end(), [&](const auto& part) { return part->acts_on(parameter); });
}

void Compose::check_shapes(const NamedParameters& selected) const {
  for (const auto& part : parts_) part->select(selected);
}

void Compose::replace(std::vector<Weight>& weights) {
  for (const auto& part : parts_) {
    std::vector<Weight> chosen;
    std::vector<size_t> positions;
    for (size_t i = 0; i < weights.size(); ++i) {
      weights[i].squares.clear();  // of the values before the last part
      if (!part->acts_on(weights[i].value)) continue;
      chosen.push_back(weights[i]);
      positions.push_back(i);
    }
    if (!chosen.empty()) part->replace(chosen);
    for (size_t j = 0; j < positions.size(); ++j) {
      finish(chosen[j]);
      weights[positions[j]] = std::move(chosen[j]);
    }
  }
}

State Compose::state_dict() const {
  State state;
  for (size_t i = 0; i < parts_.size(); ++i) insert(state, std::to_string(i), *parts_[i]);
  return state;
}

void Compose::load_state_dict(const State& state) {
  TORCH_CHECK_VALUE(!state.contains(std::to_string(parts_.size())),
                    "regularize: the state is of a Compose of more than ", parts_.size(),
                    " parts: make the same one again to go on, or start without the state");
  for (size_t i = 0; i < parts_.size(); ++i) restore(state, std::to_string(i), *parts_[i]);
}

}  // namespace cctorch::regularize
