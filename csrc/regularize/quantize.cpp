#include <ATen/ATen.h>
#include <cctorch/regularizers.h>

#include "csrc/ops/cpu/channelwise.h"
#include "csrc/ops/cpu/simd/uniform_grid.h"
#include "csrc/regularize/matrices.h"
#include "csrc/regularize/uniform_grid.h"

namespace cctorch::regularize {

namespace {

simd::UniformGrid uniform_grid(at::ScalarType type) {
  const auto storage = channelwise::storage(type);
  return for_isa(&simd::baseline::uniform_grid, &simd::avx2::uniform_grid, &simd::avx512::uniform_grid)(storage);
}

// Rows one after the other in memory.
at::Tensor with_rows_in_order(const at::Tensor& weight, bool per_channel) {
  const bool dense = weight.is_non_overlapping_and_dense();
  return dense && (!per_channel || channelwise::layout(weight, 0).outer == 1) ? weight : weight.contiguous();
}

// The same grids row by row, each in a thread's cache. A level is not larger than the row's largest magnitude.
void quantize_on_cpu(std::vector<Weight>& weights, bool per_channel, double q, bool search) {
  for (Weight& weight : weights) {
    weight.value = with_rows_in_order(weight.value, per_channel);
    weight.rewrite.size = per_channel ? weight.value.numel() / weight.value.size(0) : weight.value.numel();
    weight.rewrite.piece = [quantize = uniform_grid(weight.value.scalar_type()), q, search](const void* from, void* to,
                                                                                            int64_t, int64_t size) {
      quantize(from, to, size, q, search);
      return std::nullopt;
    };
  }
}

}  // namespace

UniformQuantization::UniformQuantization(int64_t bits, bool per_channel, Range range)
    : bits_(bits), per_channel_(per_channel), range_(range) {
  TORCH_CHECK_VALUE(2 <= bits && bits <= 16, "UniformQuantization: bits = ", bits,
                    ", expected 2 to 16; for 1 bit use BinaryCodeQuantization");
}

void UniformQuantization::replace(std::vector<Weight>& weights) {
  const auto q = static_cast<double>((int64_t{1} << (bits_ - 1)) - 1);
  const bool search = range_ == Range::mse;
  if (weights.front().value.is_cpu() && !(search && q == 1)) {
    quantize_on_cpu(weights, per_channel_, q, search);
  } else {
    replace_rows(weights, per_channel_,
                 [&](const at::Tensor& rows, at::ScalarType type) { return on_uniform_grid(rows, type, q, range_); });
  }
  for (Weight& weight : weights) {
    // Zero is a level, so what was pruned stays pruned.
    if (weight.storage.factored) weight.storage = Storage::dense(weight.value);
    weight.storage.bits_per_value = bits_;
    weight.storage.table_bits = (per_channel_ ? weight.value.size(0) : 1) * bits_per_element(weight.value);
  }
}

}  // namespace cctorch::regularize
