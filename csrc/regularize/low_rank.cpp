#include "csrc/regularize/low_rank.h"

#include <ATen/ATen.h>
#include <cctorch/low_rank.h>

#include <algorithm>
#include <cmath>

#include "csrc/ops/truncated_svd.h"
#include "csrc/regularize/matrices.h"

namespace cctorch::regularize {

namespace low_rank {

void check_ratio(const char* who, const std::optional<double>& ratio) {
  TORCH_CHECK_VALUE(!ratio || (*ratio > 1 && std::isfinite(*ratio)), who, ": ratio = ", ratio.value_or(0),
                    ", expected a finite number above 1: weights for each entry of the factors");
}

std::vector<Weight*> factored(std::vector<Weight>& weights,
                              const std::function<Factored(const at::Tensor& weight)>& describe) {
  std::vector<Weight*> chosen;
  for (Weight& weight : weights) {
    const Factored found = describe(weight.value);
    if (found.entries >= weight.value.numel()) continue;
    const bool inputs_pruned = weight.storage.inputs_pruned;
    weight.storage = Storage::dense(weight.value);
    weight.storage.inputs_pruned = inputs_pruned;
    weight.storage.values = found.entries;
    weight.storage.factored = true;
    weight.storage.form = found.form;
    chosen.push_back(&weight);
  }
  return chosen;
}

at::Tensor recall(const State& bases, const std::string& key, at::IntArrayRef sizes, const at::Tensor& like) {
  const auto entry = bases.find(key);
  const auto* basis = entry == bases.end() ? nullptr : std::get_if<at::Tensor>(&entry->second);
  const bool fits = basis != nullptr && basis->sizes() == sizes && basis->scalar_type() == like.scalar_type() &&
                    basis->device() == like.device();
  return fits ? *basis : at::empty({0}, like.options());
}

int64_t rank_for(double ratio, int64_t rows, int64_t columns) {
  const double entries = static_cast<double>(rows * columns) / ratio;
  return std::max<int64_t>(1, static_cast<int64_t>(entries / static_cast<double>(rows + columns)));
}

void truncate(const std::vector<Weight*>& weights, const Unfolding& unfolding, const std::vector<int64_t>& ranks,
              State& state) {
  std::vector<at::Tensor> matrices, bases;
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor& matrix = matrices.emplace_back(unfolding.to_matrix(weights[i]->value));
    const int64_t rows = matrix.size(0), columns = matrix.size(1);
    const std::vector<int64_t> sizes =
        rows <= columns ? std::vector<int64_t>{rows, ranks[i]} : std::vector<int64_t>{ranks[i], columns};
    bases.push_back(recall(state, "basis." + weights[i]->name, sizes, matrix));
  }
  const auto [left, right] = truncated_svd(matrices, ranks, bases);
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i]->value = unfolding.to_weight(at::mm(left[i], right[i]), weights[i]->value.sizes());
    if (!starts_from_bases(matrices[i])) continue;
    state["basis." + weights[i]->name] = matrices[i].size(0) <= matrices[i].size(1) ? left[i] : right[i];
  }
}

}  // namespace low_rank

SVD::SVD(RankOrRatio size, MatrixView view) : size_(size), view_(view) {
  TORCH_CHECK_VALUE(size.rank.has_value() != size.ratio.has_value(), "SVD: expected either a rank or a ratio, got ",
                    size.rank ? "both" : "neither");
  TORCH_CHECK_VALUE(size.rank.value_or(1) >= 1, "SVD: rank = ", size.rank.value_or(1), ", expected at least 1");
  low_rank::check_ratio("SVD", size.ratio);
}

void SVD::replace(std::vector<Weight>& weights) {
  const auto is_spatial = [&](const at::Tensor& weight) {
    return view_ == MatrixView::spatial && weight.dim() == 4 && weight.size(2) * weight.size(3) > 1;
  };
  const auto rows_of = [&](const at::Tensor& weight) {
    return weight.size(0) * (is_spatial(weight) ? weight.size(2) : 1);
  };
  const auto rank_of = [&](const at::Tensor& weight) {
    const int64_t rows = rows_of(weight);
    return size_.rank ? *size_.rank : low_rank::rank_for(size_.ratio.value(), rows, weight.numel() / rows);
  };
  const auto chosen = low_rank::factored(weights, [&](const at::Tensor& weight) -> low_rank::Factored {
    const int64_t rank = rank_of(weight), rows = rows_of(weight);
    const auto layout = is_spatial(weight) ? LowRankLayout::spatial : LowRankLayout::channel;
    return {rank * (rows + weight.numel() / rows), {.rank = rank, .layout = layout}};
  });
  std::vector<int64_t> ranks;
  for (const Weight* weight : chosen) ranks.push_back(rank_of(weight->value));
  low_rank::truncate(chosen, as_matrix(view_), ranks, bases_);
}

}  // namespace cctorch::regularize
