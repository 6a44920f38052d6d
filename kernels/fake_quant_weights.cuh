#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "csrc/ops/formula/fake_quant_weights.h"
#include "kernels/list.cuh"
#include "kernels/vector.cuh"

// Rows of a list of weights, each quantized on the grid that its largest magnitude ends.
namespace cctorch::cuda::quantize_rows {

// A weight of `count` rows of `size` elements; `first` is the number of its first row in the concatenation.
struct Entry {
  const void* from;
  void* to;
  void* scales;
  int64_t size;
  int64_t first;
};

// One block for each row. The list travels as an argument: nothing waits for a copy, and a captured graph keeps it.
template <typename S, typename T>
struct QuantizeRows {
  using Bits = formula::BitsOf<S>;
  // What shuffles know
  using Key = std::conditional_t<sizeof(S) == 8, unsigned long long, unsigned>;
  struct Shared {
    Key warp_largest[kWarps];
  };
  static constexpr int64_t kEntries = 100;  // within the 4 KB that arguments may have

  formula::FakeQuantWeights<T> formula;
  Bits infinity;
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
    Key own = 0;
    visit_all(static_cast<const Bits*>(weight.from), begin, end,
              [&](Bits bits) { own = std::max(own, static_cast<Key>(formula::magnitude_of_number(bits, infinity))); });
    const auto largest = static_cast<Bits>(block_max(own, shared.warp_largest));
    S value;
    memcpy(&value, &largest, sizeof(S));
    const T scale = formula.scale(static_cast<T>(value));
    if (threadIdx.x == 0) static_cast<T*>(weight.scales)[row] = scale;
    map_all(static_cast<S*>(weight.to), static_cast<const S*>(weight.from), begin, end,
            [&](S x) { return static_cast<S>(formula.grid.forward(static_cast<T>(x), scale)); });
  }
};

// `entries` end with one whose `first` is the number of all rows; none of the others is empty.
template <typename S, typename T, typename Launch>
void quantize(const Launch& launch, const std::vector<Entry>& entries, int64_t qmax,
              typename QuantizeRows<S, T>::Bits infinity) {
  using Kernel = QuantizeRows<S, T>;
  static_assert(sizeof(Kernel) <= 4096);
  const auto size = static_cast<int64_t>(entries.size()) - 1;
  for (int64_t begin = 0; begin < size; begin += Kernel::kEntries) {
    Kernel kernel{
        formula::FakeQuantWeights<T>::with_qmax(qmax), infinity, std::min(Kernel::kEntries, size - begin), {}};
    std::copy_n(entries.begin() + begin, kernel.count, kernel.entries);
    launch(entries[begin + kernel.count].first - entries[begin].first, kernel);
  }
}

}  // namespace cctorch::cuda::quantize_rows
