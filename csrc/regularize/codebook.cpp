#include <ATen/ATen.h>
#include <cctorch/regularizers.h>

#include "csrc/ops/row_fits.h"
#include "csrc/regularize/cpu_rows.h"
#include "csrc/regularize/matrices.h"
#include "csrc/regularize/value_sets.h"

namespace cctorch::regularize {

at::Tensor on_codebook(const at::Tensor& rows, int64_t count) {
  const SortedRows sorted(rows);
  const at::Tensor& values = sorted.values();
  const int64_t columns = rows.size(-1);
  const at::Tensor fraction = (at::arange(count, rows.options()) + 0.5) / count;
  const at::Tensor smallest = values.narrow(-1, 0, 1), largest = values.narrow(-1, columns - 1, 1);
  const at::Tensor even = smallest + (largest - smallest) * fraction;
  const at::Tensor quantiles = values.index_select(-1, (fraction * columns).to(at::kLong));
  const auto fitted = lloyd(sorted, at::stack({even, quantiles}, 1)).unbind(1);
  // How far the squared error is below ||w||^2.
  const auto gain = [&](const at::Tensor& centers) {
    const auto cells = sorted.cells(midpoints(centers));
    return (2 * centers * cells.sums - centers.square() * cells.counts).sum(-1, true);
  };
  const at::Tensor centers = at::where(gain(fitted[1]) > gain(fitted[0]), fitted[1], fitted[0]);
  // A row of so few distinct values is its own best codebook.
  const at::Tensor changes = (values.narrow(-1, 1, columns - 1) != values.narrow(-1, 0, columns - 1)).sum(-1, true);
  return at::where(changes < count, rows, nearest(rows, centers));
}

CodebookQuantization::CodebookQuantization(int64_t bits) : bits_(bits) {
  TORCH_CHECK_VALUE(1 <= bits && bits <= 8, "CodebookQuantization: bits = ", bits, ", expected 1 to 8");
}

void CodebookQuantization::replace(std::vector<Weight>& weights) {
  const int64_t count = int64_t{1} << bits_;
  if (weights.front().value.is_cpu()) {
    replace_cpu_rows(weights, /*per_channel=*/false, [&](cpu::RowFit& fit, double* row, int64_t size, at::ScalarType) {
      fit.codebook(row, size, count);
    });
  } else {
    replace_rows(weights, /*per_channel=*/false,
                 [&](const at::Tensor& rows, at::ScalarType) { return on_codebook(rows, count); });
  }
  for (Weight& weight : weights) {
    weight.storage = Storage::dense(weight.value);
    weight.storage.bits_per_value = bits_;
    weight.storage.table_bits = count * bits_per_element(weight.value);
  }
}

}  // namespace cctorch::regularize
