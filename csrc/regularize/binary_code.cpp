#include <ATen/ATen.h>
#include <cctorch/regularize.h>

#include <array>
#include <limits>

#include "csrc/regularize/matrices.h"
#include "csrc/regularize/sorted_rows.h"

namespace cctorch::regularize {

namespace {

constexpr int kIterations = 20;

at::Tensor with_sign_of(const at::Tensor& magnitudes, const at::Tensor& rows) {
  return at::where(rows < 0, -magnitudes, magnitudes);
}

// Two scales give any two magnitudes a1 + a2 and a1 - a2, so the best of them are 2-means of |w|, found exactly:
// rows x 2, the larger first.
at::Tensor two_magnitudes(const at::Tensor& magnitudes) {
  const int64_t columns = magnitudes.size(-1);
  const at::Tensor upper = std::get<0>(at::sort(magnitudes, -1, /*descending=*/true)).cumsum(-1);
  const at::Tensor lower = upper.narrow(-1, columns - 1, 1) - upper;
  const at::Tensor count = at::arange(1, columns + 1, magnitudes.options());
  const at::Tensor rest = (columns - count).clamp_min(1);
  const at::Tensor best = (upper.square() / count + lower.square() / rest).argmax(-1, true);
  return at::cat({upper.gather(-1, best) / (best + 1), lower.gather(-1, best) / (columns - 1 - best).clamp_min(1)}, -1);
}

// Alternates between the nearest of the 8 levels +-a1 +-a2 +-a3 and least squares for a.
at::Tensor three_codes(const at::Tensor& rows) {
  const at::Tensor magnitudes = two_magnitudes(rows.abs());
  const at::Tensor high = magnitudes.narrow(-1, 0, 1), low = magnitudes.narrow(-1, 1, 1);
  const at::Tensor rest = (nearest(rows.abs(), magnitudes.flip(-1)) - rows.abs()).abs_().mean(-1, true);
  at::Tensor scales = at::cat({(high + low) / 2, (high - low) / 2, rest}, -1);
  const at::Tensor bits = at::arange(8, rows.options().dtype(at::kLong));
  const at::Tensor signs =
      at::stack({bits.bitwise_and(1), bits.bitwise_and(2) / 2, bits.bitwise_and(4) / 4}, -1).to(at::kDouble) * 2 - 1;
  const SortedRows sorted(rows);
  for (int i = 0; i < kIterations; ++i) {
    const auto [levels, order] = at::sort(at::matmul(scales, signs.t()));
    const auto cells = sorted.cells(midpoints(levels));
    const at::Tensor code = signs.index({order});  // rows x 8 x 3
    const at::Tensor transposed = code.transpose(-1, -2);
    const at::Tensor gram = at::matmul(transposed, cells.counts.unsqueeze(-1) * code);
    const at::Tensor moment = at::matmul(transposed, cells.sums.unsqueeze(-1));
    scales = at::matmul(at::linalg_pinv(gram, 1e-12, /*hermitian=*/true), moment).squeeze(-1);
  }
  return nearest(rows, std::get<0>(at::sort(at::matmul(scales, signs.t()))));
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
  const double precision = type == at::kDouble  ? std::numeric_limits<double>::epsilon()
                           : type == at::kFloat ? std::numeric_limits<float>::epsilon()
                           : type == at::kHalf  ? 0x1p-10
                                                : 0x1p-7;
  const at::Tensor fits = (expected - distinct[3]).abs() <= 4 * precision * distinct[0];
  return (last < 3).logical_or((last == 3).logical_and(fits));
}

at::Tensor quantize(const at::Tensor& rows, int64_t bits, at::ScalarType type) {
  at::Tensor coded;
  if (bits == 1) {
    coded = with_sign_of(rows.abs().mean(-1, true), rows);
  } else if (bits == 2) {
    coded = with_sign_of(nearest(rows.abs(), two_magnitudes(rows.abs()).flip(-1)), rows);
  } else {
    coded = three_codes(rows);
  }
  return at::where(is_code(rows, bits, type), rows, coded);
}

}  // namespace

BinaryCodeQuantization::BinaryCodeQuantization(int64_t bits, bool per_channel)
    : bits_(bits), per_channel_(per_channel) {
  TORCH_CHECK_VALUE(1 <= bits && bits <= 3, "BinaryCodeQuantization: bits = ", bits,
                    ", expected 1 to 3; for more use UniformQuantization or CodebookQuantization");
}

void BinaryCodeQuantization::replace(std::vector<Weight>& weights) {
  replace_rows(weights, per_channel_,
               [&](const at::Tensor& rows, at::ScalarType type) { return quantize(rows, bits_, type); });
  for (Weight& weight : weights) {
    const int64_t rows = per_channel_ ? weight.value.size(0) : 1;
    weight.storage = Storage::dense(weight.value);
    weight.storage.bits_per_value = bits_;
    weight.storage.table_bits = rows * bits_ * bits_per_element(weight.value);
  }
}

}  // namespace cctorch::regularize
