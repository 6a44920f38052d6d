#include <ATen/ATen.h>
#include <cctorch/low_rank.h>
#include <cctorch/regularizers.h>

#include <algorithm>
#include <cmath>

#include "csrc/ops/tucker2.h"
#include "csrc/regularize/low_rank.h"

namespace cctorch::regularize {

namespace {

struct Shape {
  explicit Shape(at::IntArrayRef sizes)
      : outputs(sizes[0]), inputs(sizes[1]), kernel(c10::multiply_integers(sizes.slice(2))) {}
  int64_t outputs, inputs, kernel;
};

// `ratio`: the same fraction f of both channel counts, from
//   f (N^2 + C^2) + f^2 N C k = N C k / ratio;
// of a matrix, whose core the factors absorb, one rank.
std::pair<int64_t, int64_t> ranks_of(const RanksOrRatio& size, const Shape& shape) {
  if (size.ranks) {
    const auto [out, in] = *size.ranks;
    const int64_t rank = std::min({out, in, shape.outputs, shape.inputs});
    return shape.kernel == 1 ? std::pair(rank, rank)
                             : std::pair(std::min(out, shape.outputs), std::min(in, shape.inputs));
  }
  TORCH_INTERNAL_ASSERT(size.ratio.has_value());
  if (shape.kernel == 1) {
    const int64_t rank = low_rank::rank_for(*size.ratio, shape.outputs, shape.inputs);
    return {rank, rank};
  }
  const auto outputs = static_cast<double>(shape.outputs), inputs = static_cast<double>(shape.inputs);
  const double core = outputs * inputs * static_cast<double>(shape.kernel);
  const double factors = outputs * outputs + inputs * inputs;
  const double budget = core / *size.ratio;
  const double fraction = 2 * budget / (factors + std::sqrt(factors * factors + 4 * core * budget));
  return {std::max<int64_t>(1, static_cast<int64_t>(fraction * outputs)),
          std::max<int64_t>(1, static_cast<int64_t>(fraction * inputs))};
}

}  // namespace

Tucker2::Tucker2(RanksOrRatio size, int64_t iterations) : size_(size), iterations_(iterations) {
  TORCH_CHECK_VALUE(size.ranks.has_value() != size.ratio.has_value(), "Tucker2: expected either ranks or a ratio, got ",
                    size.ranks ? "both" : "neither");
  TORCH_CHECK_VALUE(!size.ranks || (size.ranks->first >= 1 && size.ranks->second >= 1),
                    "Tucker2: ranks = ", size.ranks.value_or(std::pair<int64_t, int64_t>()).first, ", ",
                    size.ranks.value_or(std::pair<int64_t, int64_t>()).second, ", expected at least 1");
  TORCH_CHECK_VALUE(iterations >= 0, "Tucker2: iterations = ", iterations, ", expected at least 0");
  low_rank::check_ratio("Tucker2", size.ratio);
}

void Tucker2::replace(std::vector<Weight>& weights) {
  const auto is_matrix = [](const Weight& weight) { return Shape(weight.value.sizes()).kernel == 1; };
  const auto chosen = low_rank::factored(weights, [&](const at::Tensor& weight) -> low_rank::Factored {
    const Shape shape(weight.sizes());
    const auto [out, in] = ranks_of(size_, shape);
    const int64_t factors = out * shape.outputs + in * shape.inputs;
    if (shape.kernel == 1) return {factors, {.rank = out}};
    return {factors + out * in * shape.kernel, {.rank = out, .layout = LowRankLayout::tucker, .rank_in = in}};
  });
  std::vector<Weight*> matrices, kernels;
  for (Weight* weight : chosen) (is_matrix(*weight) ? matrices : kernels).push_back(weight);
  std::vector<int64_t> ranks;
  for (const Weight* weight : matrices) ranks.push_back(ranks_of(size_, Shape(weight->value.sizes())).first);
  if (!matrices.empty()) low_rank::truncate(matrices, as_matrix(MatrixView::channel), ranks, bases_);
  if (!kernels.empty()) truncate(kernels);
}

void Tucker2::truncate(const std::vector<Weight*>& weights) {
  std::vector<at::Tensor> values, start_out, start_in;
  std::vector<int64_t> ranks_out, ranks_in;
  for (const Weight* weight : weights) {
    const at::Tensor& value = values.emplace_back(weight->value);
    const auto [out, in] = ranks_of(size_, Shape(value.sizes()));
    ranks_out.push_back(out);
    ranks_in.push_back(in);
    start_out.push_back(low_rank::recall(bases_, "out." + weight->name, {value.size(0), out}, value));
    start_in.push_back(low_rank::recall(bases_, "in." + weight->name, {value.size(1), in}, value));
  }
  const auto [cores, out, in] = tucker2(values, ranks_out, ranks_in, iterations_, start_out, start_in);
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor narrow = at::matmul(in[i], cores[i].reshape({ranks_out[i], ranks_in[i], -1}));
    weights[i]->value = at::mm(out[i], narrow.flatten(1)).view(values[i].sizes());
    if (!tucker2_starts_from_bases(values[i])) continue;
    bases_["out." + weights[i]->name] = out[i];
    bases_["in." + weights[i]->name] = in[i];
  }
}

}  // namespace cctorch::regularize
