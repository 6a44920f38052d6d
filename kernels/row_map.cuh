#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "csrc/ops/formula/fake_quant_weights.h"
#include "csrc/ops/formula/float_quant.h"
#include "kernels/list.cuh"
#include "kernels/vector.cuh"

// Rows of a list of weights, of which each has a parameter that all of it decides: a block goes over its row twice.
namespace cctorch::cuda::row_map {

// A weight of `count` rows of `size` elements; `first` is the number of its first row in the concatenation.
struct Entry {
  const void* from;
  void* to;
  void* parameters;  // of the rows, or null
  int64_t size;
  int64_t first;
};

// What shuffles know of the bits of a magnitude.
template <typename S>
using Key = std::conditional_t<sizeof(S) == 8, unsigned long long, unsigned>;

template <typename S>
__device__ S value_of(Key<S> key) {
  const auto bits = static_cast<formula::BitsOf<S>>(key);
  S value;
  memcpy(&value, &bits, sizeof(S));
  return value;
}

// The grid that the largest magnitude ends; NaN has no say.
template <typename S, typename T>
struct OnLargest {
  using Value = S;
  using Read = formula::BitsOf<S>;
  using Part = Key<S>;
  using Parameter = T;

  formula::FakeQuantWeights<T> formula;
  Read infinity;

  __device__ Part add(Part part, Read bits) const {
    return std::max(part, static_cast<Part>(formula::magnitude_of_number(bits, infinity)));
  }
  __device__ Part all(Part own, Part* shared) const { return block_max(own, shared); }
  __device__ T parameter(Part largest, int64_t) const { return formula.scale(static_cast<T>(value_of<S>(largest))); }
  __device__ S map(S x, T scale) const { return static_cast<S>(formula.grid.forward(static_cast<T>(x), scale)); }
};

// INQ's powers of two below the largest magnitude's; NaN is larger than any number.
template <typename S, typename T>
struct PowersOfTwo {
  using Value = S;
  using Read = formula::BitsOf<S>;
  using Part = Key<S>;
  using Parameter = T;

  formula::FloatQuant<T> grid;

  __device__ Part add(Part part, Read bits) const {
    return std::max(part, static_cast<Part>(formula::magnitude(bits)));
  }
  __device__ Part all(Part own, Part* shared) const { return block_max(own, shared); }
  __device__ T parameter(Part largest, int64_t) const {
    return formula::top_power(static_cast<T>(value_of<S>(largest)));
  }
  __device__ S map(S x, T top) const { return static_cast<S>(grid.forward(static_cast<T>(x), top)); }
};

// The mean magnitude with each element's sign; 0 and NaN count as positive.
template <typename S, typename T>
struct ScaledSigns {
  using Value = S;
  using Read = S;
  using Part = double;
  using Parameter = S;

  __device__ Part add(Part part, S x) const { return part + std::abs(static_cast<double>(x)); }
  __device__ Part all(Part own, Part* shared) const { return block_sum(own, shared); }
  __device__ S parameter(Part sum, int64_t size) const { return static_cast<S>(sum / static_cast<double>(size)); }
  __device__ S map(S x, S mean) const { return static_cast<T>(x) < 0 ? S(-mean) : mean; }
};

// One block for each row. The list travels as an argument: nothing waits for a copy, and a captured graph keeps it.
template <typename Rule>
struct RowMap {
  using S = typename Rule::Value;
  struct Shared {
    typename Rule::Part warp_parts[kWarps];
  };
  static constexpr int64_t kEntries = 98;  // within the 4 KB that arguments may have

  Rule rule;
  int64_t count;
  Entry entries[kEntries];

  __device__ const Entry& entry() const {
    return entries[last_from(count, blockIdx.x + entries[0].first, [&](int64_t i) { return entries[i].first; })];
  }

  __device__ void operator()(Shared& shared) const {
    const Entry& weight = entry();
    const int64_t row = blockIdx.x + entries[0].first - weight.first;
    const int64_t begin = row * weight.size;
    const int64_t end = begin + weight.size;
    typename Rule::Part own = 0;
    visit_all(static_cast<const typename Rule::Read*>(weight.from), begin, end,
              [&](auto value) { own = rule.add(own, value); });
    const typename Rule::Parameter parameter = rule.parameter(rule.all(own, shared.warp_parts), weight.size);
    if (threadIdx.x == 0 && weight.parameters != nullptr) {
      static_cast<typename Rule::Parameter*>(weight.parameters)[row] = parameter;
    }
    map_all(static_cast<S*>(weight.to), static_cast<const S*>(weight.from), begin, end,
            [&](S x) { return rule.map(x, parameter); });
  }
};

// `entries` end with one whose `first` is the number of all rows; none of the others is empty.
template <typename Rule, typename Launch>
void map_rows(const Launch& launch, const std::vector<Entry>& entries, const Rule& rule) {
  using Kernel = RowMap<Rule>;
  static_assert(sizeof(Kernel) <= 4096);
  const auto size = static_cast<int64_t>(entries.size()) - 1;
  for (int64_t begin = 0; begin < size; begin += Kernel::kEntries) {
    Kernel kernel{rule, std::min(Kernel::kEntries, size - begin), {}};
    std::copy_n(entries.begin() + begin, kernel.count, kernel.entries);
    launch(entries[begin + kernel.count].first - entries[begin].first, kernel);
  }
}

}  // namespace cctorch::cuda::row_map
