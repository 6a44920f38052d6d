#include <ATen/ATen.h>
#include <cctorch/regularize.h>

#include <algorithm>
#include <cmath>

#include "csrc/regularize/low_rank.h"

namespace cctorch::regularize {

namespace {

struct Shape {
  explicit Shape(at::IntArrayRef sizes)
      : outputs(sizes[0]), inputs(sizes[1]), kernel(c10::multiply_integers(sizes.slice(2))) {}
  int64_t outputs, inputs, kernel;
};

// `ratio`: the same fraction f of both channel counts, from
//   f (N^2 + C^2) + f^2 N C k = N C k / ratio.
std::pair<int64_t, int64_t> ranks_of(const RanksOrRatio& size, const Shape& shape) {
  if (size.ranks) {
    return {std::min(size.ranks->first, shape.outputs), std::min(size.ranks->second, shape.inputs)};
  }
  TORCH_INTERNAL_ASSERT(size.ratio.has_value());
  const auto outputs = static_cast<double>(shape.outputs), inputs = static_cast<double>(shape.inputs);
  const double core = outputs * inputs * static_cast<double>(shape.kernel);
  const double factors = outputs * outputs + inputs * inputs;
  const double budget = core / *size.ratio;
  const double fraction = 2 * budget / (factors + std::sqrt(factors * factors + 4 * core * budget));
  return {std::max<int64_t>(1, static_cast<int64_t>(fraction * outputs)),
          std::max<int64_t>(1, static_cast<int64_t>(fraction * inputs))};
}

// Of a batch x outputs x inputs x kernel: the inputs first.
at::Tensor swapped(const at::Tensor& w) { return w.transpose(1, 2).contiguous(); }

// `w` with its outputs in the space of `basis`.
at::Tensor coordinates(const at::Tensor& basis, const at::Tensor& w) {
  return at::matmul(basis.transpose(-1, -2), w.flatten(2)).unflatten(2, w.sizes().slice(2));
}

// Higher-order SVD, then higher-order orthogonal iteration: each basis in turn is the best for the other.
at::Tensor tucker(const at::Tensor& w, int64_t rank_out, int64_t rank_in, int64_t iterations) {
  at::Tensor out = low_rank::leading(w.flatten(2), rank_out);
  const at::Tensor by_input = swapped(w);
  at::Tensor in = low_rank::leading(by_input.flatten(2), rank_in);
  for (int64_t i = 0; i < iterations; ++i) {
    out = low_rank::leading(swapped(coordinates(in, by_input)).flatten(2), rank_out);
    in = low_rank::leading(swapped(coordinates(out, w)).flatten(2), rank_in);
  }
  const at::Tensor narrowed = low_rank::onto(out, w.flatten(2)).view(w.sizes());
  return swapped(low_rank::onto(in, swapped(narrowed).flatten(2)).view(by_input.sizes()));
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
  const auto entries = [&](const at::Tensor& weight) {
    const Shape shape(weight.sizes());
    const auto [out, in] = ranks_of(size_, shape);
    return out * shape.outputs + in * shape.inputs + out * in * shape.kernel;
  };
  const Unfolding by_kernel{
      [](const at::Tensor& weight) { return weight.reshape({weight.size(0), weight.size(1), -1}); },
      [](const at::Tensor& cube, at::IntArrayRef sizes) { return cube.reshape(sizes); }};
  low_rank::replace_factored(weights, by_kernel, entries, [&](const at::Tensor& cubes, at::ScalarType) {
    const auto [out, in] = ranks_of(size_, Shape(cubes.sizes().slice(1)));
    return tucker(cubes, out, in, iterations_);
  });
}

}  // namespace cctorch::regularize
