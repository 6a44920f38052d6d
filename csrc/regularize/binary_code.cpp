#include <ATen/ATen.h>
#include <cctorch/regularizers.h>

#include <array>
#include <limits>

#include "csrc/ops/best_grids.h"
#include "csrc/regularize/cpu_rows.h"
#include "csrc/regularize/matrices.h"
#include "csrc/regularize/value_sets.h"

namespace cctorch::regularize {

namespace {

double precision_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return std::numeric_limits<double>::epsilon();
    case at::kHalf:
      return 0x1p-10;
    case at::kBFloat16:
      return 0x1p-7;
    default:
      return std::numeric_limits<float>::epsilon();
  }
}

// Whether a row is a sum of `bits` scaled codes already. 1, 2 or 3 distinct magnitudes are one of 1, 2 or 3 codes; 4
// are one of 3 codes if the smallest is |second + third - first|, as far as the type shows.
at::Tensor is_code(const at::Tensor& rows, int64_t bits, at::ScalarType type) {
  const at::Tensor magnitudes = std::get<0>(at::sort(rows.abs(), -1, /*descending=*/true));
  const int64_t inner = rows.size(-1) - 1;
  const at::Tensor index = at::constant_pad_nd(
      (magnitudes.narrow(-1, 1, inner) != magnitudes.narrow(-1, 0, inner)).to(at::kLong).cumsum(-1), {1, 0});
  const at::Tensor last = index.narrow(-1, inner, 1);
  if (bits < 3) return last < bits;
  std::array<at::Tensor, 4> distinct;
  for (int64_t i = 0; i < 4; ++i) distinct[i] = at::where(index == i, magnitudes, 0.0).amax(-1, true);
  const at::Tensor expected = (distinct[1] + distinct[2] - distinct[0]).abs();
  const at::Tensor fits = (expected - distinct[3]).abs() <= 4 * precision_of(type) * distinct[0];
  return (last < 3).logical_or((last == 3).logical_and(fits));
}

}  // namespace

at::Tensor as_binary_code(const at::Tensor& rows, int64_t bits, at::ScalarType type) {
  return at::where(is_code(rows, bits, type), rows, composed::fitted_code(rows, bits));
}

BinaryCodeQuantization::BinaryCodeQuantization(int64_t bits, bool per_channel)
    : bits_(bits), per_channel_(per_channel) {
  TORCH_CHECK_VALUE(1 <= bits && bits <= 3, "BinaryCodeQuantization: bits = ", bits,
                    ", expected 1 to 3; for more use UniformQuantization or CodebookQuantization");
}

void BinaryCodeQuantization::replace(std::vector<Weight>& weights) {
  if (weights.front().value.is_cpu()) {
    replace_cpu_rows(weights, per_channel_, [&](cpu::RowFit& fit, double* row, int64_t size, at::ScalarType type) {
      fit.binary_code(row, size, bits_, precision_of(type));
    });
  } else {
    replace_rows(weights, per_channel_,
                 [&](const at::Tensor& rows, at::ScalarType type) { return as_binary_code(rows, bits_, type); });
  }
  for (Weight& weight : weights) {
    const int64_t rows = per_channel_ ? weight.value.size(0) : 1;
    weight.storage = Storage::dense(weight.value);
    weight.storage.bits_per_value = bits_;
    weight.storage.table_bits = rows * bits_ * bits_per_element(weight.value);
  }
}

}  // namespace cctorch::regularize
