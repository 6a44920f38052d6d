#include "csrc/regularize/matrices.h"

#include <ATen/ATen.h>

#include <map>
#include <utility>

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
  const Unfolding unfolding = as_rows(per_channel);
  std::map<std::pair<at::ScalarType, int64_t>, std::vector<size_t>> groups;
  std::vector<at::Tensor> matrices;
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor& rows = matrices.emplace_back(unfolding.to_matrix(weights[i].value));
    groups[{rows.scalar_type(), rows.size(1)}].push_back(i);
  }
  for (const auto& [kind, members] : groups) {
    std::vector<at::Tensor> parts;
    std::vector<int64_t> counts;
    for (const size_t i : members) counts.push_back(parts.emplace_back(matrices[i]).size(0));
    const auto projected = project(at::cat(parts).to(at::kDouble), kind.first).to(kind.first).split_with_sizes(counts);
    for (size_t j = 0; j < members.size(); ++j) {
      Weight& weight = weights[members[j]];
      weight.value = unfolding.to_weight(projected[j], weight.value.sizes());
    }
  }
}

int64_t bits_per_element(const at::Tensor& tensor) { return 8 * tensor.element_size(); }

}  // namespace cctorch::regularize
