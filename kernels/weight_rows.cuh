#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "csrc/ops/fake_quant_weights.h"
#include "kernels/launch.cuh"
#include "kernels/row_map.cuh"

namespace cctorch::cuda {

// The slices along an axis of the weights of a list, or each weight, as rows of kernels/row_map.cuh.
class WeightRows {
 public:
  // A block takes a row: longer ones would leave most of a GPU idle.
  static bool are_short(at::TensorList weights, std::optional<int64_t> axis) {
    constexpr int64_t kLongest = int64_t{1} << 18;
    return std::all_of(weights.begin(), weights.end(), [&](const at::Tensor& weight) {
      return weight.numel() / std::max<int64_t>(1, axis ? weight.size(*axis) : 1) <= kLongest;
    });
  }

  // The parameters of each weight's rows go to `parameters`, where there are any.
  WeightRows(at::TensorList weights, std::optional<int64_t> axis, const std::vector<at::Tensor>& parameters = {}) {
    int64_t first = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      const SliceRows& rows = rows_.emplace_back(weights[i], axis);
      if (weights[i].numel() == 0) continue;
      void* to = parameters.empty() ? nullptr : parameters[i].mutable_data_ptr();
      entries_.push_back({rows.from.const_data_ptr(), rows.to.mutable_data_ptr(), to, rows.size(), first});
      first += rows.count();
    }
    entries_.push_back({nullptr, nullptr, nullptr, 0, first});
  }

  template <typename Rule>
  void map(const Rule& rule) const {
    row_map::map_rows(Launch(), entries_, rule);
  }

  std::vector<at::Tensor> results(at::TensorList weights) const {
    std::vector<at::Tensor> results;
    for (size_t i = 0; i < rows_.size(); ++i) results.push_back(rows_[i].result(weights[i]));
    return results;
  }

 private:
  std::vector<SliceRows> rows_;
  std::vector<row_map::Entry> entries_;
};

}  // namespace cctorch::cuda
