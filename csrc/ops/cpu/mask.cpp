#include "csrc/ops/mask.h"

#include <ATen/Parallel.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>
#include <type_traits>
#include <utility>

#include "csrc/ops/checks.h"
#include "csrc/ops/formula/mask.h"

namespace cctorch::cpu {
namespace {

constexpr int64_t kBlock = 65536;
constexpr int kDigitBits = 16;
using Histogram = std::vector<int64_t>;

using formula::magnitude;

template <typename Bits>
const Bits* data(const at::Tensor& weight) {
  return static_cast<const Bits*>(weight.const_data_ptr());
}

template <typename Bits>
bool has_nan(const at::Tensor& weight) {
  const Bits infinity = static_cast<Bits>(infinity_bits(weight.scalar_type()));
  const Bits* from = data<Bits>(weight);
  return at::parallel_reduce(
      0, weight.numel(), kBlock, false,
      [&](int64_t begin, int64_t end, bool found) {
        Bits largest = 0;
        for (int64_t i = begin; i < end; ++i) largest = std::max(largest, magnitude(from[i]));
        return found || largest > infinity;
      },
      [](bool a, bool b) { return a || b; });
}

void check_no_nan(const at::Tensor& weight, const char* op, const std::string& name) {
  const bool found = with_bits(weight.scalar_type(), [&](auto bits) { return has_nan<decltype(bits)>(weight); });
  TORCH_CHECK(!found, op, ": ", name, " has NaN, so its magnitudes cannot be ordered");
}

// How many magnitudes have each value of the digit at `shift`, among those that agree with `prefix` above it.
template <typename Bits>
Histogram histogram(const std::vector<at::Tensor>& weights, Bits prefix, int shift) {
  Histogram total(size_t{1} << kDigitBits);
  std::mutex mutex;
  const int above = shift + kDigitBits;
  const Bits prefix_mask = std::cmp_less(above, 8 * sizeof(Bits)) ? static_cast<Bits>(~Bits(0) << above) : Bits(0);
  for (const auto& weight : weights) {
    const Bits* from = data<Bits>(weight);
    at::parallel_for(0, weight.numel(), kBlock, [&](int64_t begin, int64_t end) {
      Histogram part(total.size());
      for (int64_t i = begin; i < end; ++i) {
        const Bits key = magnitude(from[i]);
        if ((key & prefix_mask) == prefix) ++part[(key >> shift) & 0xffff];
      }
      const std::scoped_lock lock(mutex);
      for (size_t digit = 0; digit < part.size(); ++digit) total[digit] += part[digit];
    });
  }
  return total;
}

// The count-th largest magnitude by radix selection; `ties` becomes how many of its equals belong to the largest.
template <typename Bits>
Bits select(const std::vector<at::Tensor>& weights, int64_t count, int64_t& ties) {
  Bits prefix = 0;
  ties = count;
  for (int shift = 8 * sizeof(Bits) - kDigitBits; shift >= 0; shift -= kDigitBits) {
    const Histogram counts = histogram(weights, prefix, shift);
    size_t digit = counts.size() - 1;
    for (; counts[digit] < ties; --digit) ties -= counts[digit];
    prefix |= static_cast<Bits>(static_cast<Bits>(digit) << shift);
  }
  return prefix;
}

// Marks what is above the threshold, then the first `ties` that equal it.
template <typename Bits>
void mark(const at::Tensor& weight, Bits threshold, int64_t& ties, bool* mask) {
  const Bits* from = data<Bits>(weight);
  const int64_t numel = weight.numel();
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
  std::vector<int64_t> equal(blocks);
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      int64_t count = 0;
      for (int64_t i = block * kBlock; i < std::min(numel, (block + 1) * kBlock); ++i) {
        const Bits key = magnitude(from[i]);
        mask[i] = key > threshold;
        count += key == threshold;
      }
      equal[block] = count;
    }
  });
  for (int64_t block = 0; block < blocks && ties > 0; ++block) {
    for (int64_t i = block * kBlock; equal[block] > 0 && ties > 0; ++i) {
      if (magnitude(from[i]) != threshold) continue;
      mask[i] = true;
      --equal[block];
      --ties;
    }
  }
}

std::vector<at::Tensor> magnitude_masks(at::TensorList weights, double sparsity) {
  check_magnitude_masks(weights, sparsity);
  std::vector<at::Tensor> masks;
  if (weights.empty()) return masks;
  std::vector<at::Tensor> dense;
  int64_t total = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    dense.push_back(weights[i].contiguous());
    check_no_nan(dense.back(), "magnitude_masks", "weights[" + std::to_string(i) + "]");
    total += weights[i].numel();
  }
  const int64_t count = kept_count(sparsity, total);
  with_bits(weights[0].scalar_type(), [&](auto bits) {
    using Bits = decltype(bits);
    int64_t ties = 0;
    // A magnitude never has the top bit: nothing reaches this threshold.
    const Bits threshold = count > 0 ? select<Bits>(dense, count, ties) : static_cast<Bits>(~Bits(0));
    for (size_t i = 0; i < weights.size(); ++i) {
      const at::Tensor mask = row_major_mask(weights[i]);
      mark<Bits>(dense[i], threshold, ties, mask.mutable_data_ptr<bool>());
      masks.push_back(in_layout_of(weights[i], mask));
    }
  });
  return masks;
}

at::Tensor nm_mask(const at::Tensor& weight, int64_t n, int64_t m, int64_t axis) {
  axis = check_nm_mask(weight, n, m, axis);
  if (weight.numel() == 0) return empty_mask(weight);
  const at::Tensor dense = weight.contiguous();
  check_no_nan(dense, "nm_mask", "weight");
  const at::Tensor mask = row_major_mask(weight);
  const int64_t inner = c10::multiply_integers(weight.sizes().slice(axis + 1));
  with_bits(weight.scalar_type(), [&](auto bits) {
    using Bits = decltype(bits);
    const Bits* from = data<Bits>(dense);
    bool* to = mask.mutable_data_ptr<bool>();
    at::parallel_for(0, weight.numel() / m, std::max<int64_t>(1, kBlock / (m * m)), [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        const int64_t offset = group / inner * m * inner + group % inner;
        formula::mark_group(from + offset, to + offset, n, m, inner, [](Bits bits) { return magnitude(bits); });
      }
    });
  });
  return in_layout_of(weight, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) {
  m.impl("magnitude_masks", &magnitude_masks);
  m.impl("nm_mask", &nm_mask);
}

}  // namespace cctorch::cpu
