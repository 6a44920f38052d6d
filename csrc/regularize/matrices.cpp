#include "csrc/regularize/matrices.h"

#include <ATen/ATen.h>

#include <map>

#include "csrc/ops/rows.h"

namespace cctorch::regularize {

Unfolding as_rows(bool per_channel) {
  return {[per_channel](const at::Tensor& weight) { return weight.reshape({per_channel ? weight.size(0) : 1, -1}); },
          [](const at::Tensor& matrix, at::IntArrayRef sizes) { return matrix.reshape(sizes); }};
}

Unfolding as_matrix(MatrixView view) {
  if (view == MatrixView::channel) return as_rows(/*per_channel=*/true);
  return {[](const at::Tensor& weight) {
            if (weight.dim() != 4) return weight.reshape({weight.size(0), -1});
            return weight.permute({0, 2, 1, 3}).reshape({weight.size(0) * weight.size(2), -1});
          },
          [](const at::Tensor& matrix, at::IntArrayRef sizes) {
            if (sizes.size() != 4) return matrix.reshape(sizes);
            return matrix.reshape({sizes[0], sizes[2], sizes[1], sizes[3]}).permute({0, 2, 1, 3});
          }};
}

void replace_rows(std::vector<Weight>& weights, bool per_channel,
                  const std::function<at::Tensor(const at::Tensor& rows, at::ScalarType type)>& project) {
  std::map<at::ScalarType, std::vector<size_t>> of_type;
  for (size_t i = 0; i < weights.size(); ++i) of_type[weights[i].value.scalar_type()].push_back(i);
  for (const auto& [type, members] : of_type) {
    std::vector<at::Tensor> values;
    for (const size_t i : members) values.push_back(weights[i].value);
    const auto replaced =
        map_rows(values, per_channel ? std::optional<int64_t>(0) : std::nullopt,
                 [&, kind = type](const at::Tensor& rows) { return project(rows.to(at::kDouble), kind).to(kind); });
    for (size_t j = 0; j < members.size(); ++j) weights[members[j]].value = replaced[j];
  }
}

int64_t bits_per_element(const at::Tensor& tensor) { return 8 * tensor.element_size(); }

}  // namespace cctorch::regularize
