#pragma once

#include <algorithm>
#include <vector>

#include "csrc/ops/formula/mask.h"
#include "kernels/list.cuh"
#include "kernels/vector.cuh"

namespace cctorch::cuda {

struct NoShared {};

// A weight whose groups have their elements `inner` apart in memory; `first` counts groups.
struct GroupsEntry {
  const void* weight;
  void* mask;
  int64_t first;
  int64_t inner;
};

// formula::mark_group for the usual sizes of a group: every member is read once.
template <int m, typename Bits, typename Key>
__device__ void mark_small_group(const Bits* from, bool* mask, int64_t n, int64_t stride, const Key& key) {
  Bits keys[m];
  CCTORCH_UNROLL
  for (int i = 0; i < m; ++i) keys[i] = key(from[i * stride]);
  CCTORCH_UNROLL
  for (int i = 0; i < m; ++i) {
    int before = 0;
    CCTORCH_UNROLL
    for (int j = 0; j < m; ++j) before += j < i ? keys[j] >= keys[i] : keys[j] > keys[i];
    mask[i * stride] = before < n;
  }
}

// Marks the n largest of every m weights; one thread for each group. The list travels as an argument.
template <typename Bits>
struct MarkGroups {
  using Shared = NoShared;
  static constexpr int64_t kEntries = 120;  // within the 4 KB that arguments may have

  formula::MagnitudeOrNan<Bits> key;
  int64_t n;
  int64_t m;
  int64_t count;
  int64_t total;
  int64_t span;
  GroupsEntry entries[kEntries + 1];

  __device__ void operator()(Shared&) const {
    const List<GroupsEntry> list{entries, count, total, span};
    list.for_each_piece(blockIdx.x, [&](const GroupsEntry& entry, int64_t begin, int64_t end) {
      for (int64_t group = begin + threadIdx.x; group < end; group += kThreads) {
        const int64_t offset = group / entry.inner * m * entry.inner + group % entry.inner;
        mark(static_cast<const Bits*>(entry.weight) + offset, static_cast<bool*>(entry.mask) + offset, entry.inner);
      }
    });
  }

  __device__ void mark(const Bits* from, bool* mask, int64_t stride) const {
    if (m == 4) return mark_small_group<4>(from, mask, n, stride, key);
    if (m == 8) return mark_small_group<8>(from, mask, n, stride, key);
    formula::mark_group(from, mask, n, m, stride, key);
  }
};

// As few launches as the arguments allow. launch(blocks, kernel) starts a kernel after the ones before.
template <typename Bits, typename Launch>
void mark_groups(const Launch& launch, const std::vector<GroupsEntry>& weights, const std::vector<int64_t>& groups,
                 int64_t n, int64_t m, int64_t blocks, Bits infinity) {
  using Kernel = MarkGroups<Bits>;
  static_assert(sizeof(Kernel) <= 4096);
  const auto size = static_cast<int64_t>(weights.size());
  for (int64_t begin = 0; begin < size; begin += Kernel::kEntries) {
    Kernel kernel{{infinity}, n, m, std::min(Kernel::kEntries, size - begin), 0, 0, {}};
    for (int64_t i = 0; i < kernel.count; ++i) {
      kernel.entries[i] = weights[begin + i];
      kernel.entries[i].first = kernel.total;
      kernel.total += groups[begin + i];
    }
    kernel.entries[kernel.count] = {nullptr, nullptr, kernel.total, 1};
    if (kernel.total == 0) continue;
    kernel.span = span_of(kernel.total, blocks);
    launch(ceil_div(kernel.total, kernel.span), kernel);
  }
}

// The bits of the weights where mask, else 0.
template <typename Bits>
struct ApplyMask {
  using Shared = NoShared;
  static constexpr int kInFlight = 4;  // vectors that a thread loads before it stores the first
  static constexpr int kStep = kThreads * kVector<Bits>;
  static constexpr int64_t kTile = int64_t(kInFlight) * kStep;

  Bits* y;
  const Bits* weight;
  const bool* mask;
  int64_t numel;
  bool aligned;

  __device__ void operator()(Shared&) const {
    const int64_t begin = blockIdx.x * kTile;
    const int64_t end = std::min(begin + kTile, numel);
    if (aligned && end - begin == kTile) {
      vectors(begin + threadIdx.x * kVector<Bits>);
    } else {
      for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) y[i] = mask[i] ? weight[i] : Bits(0);
    }
  }

  __device__ void vectors(int64_t first) const {
    Pack<Bits, kVector<Bits>> packs[kInFlight];
    Pack<bool, kVector<Bits>> kept[kInFlight];
    CCTORCH_UNROLL
    for (int k = 0; k < kInFlight; ++k) {
      packs[k] = load<kVector<Bits>>(weight + first + k * kStep);
      kept[k] = load<kVector<Bits>>(mask + first + k * kStep);
    }
    CCTORCH_UNROLL
    for (int k = 0; k < kInFlight; ++k) {
      CCTORCH_UNROLL
      for (int j = 0; j < kVector<Bits>; ++j) {
        packs[k].values[j] = kept[k].values[j] ? packs[k].values[j] : Bits(0);
      }
      store(y + first + k * kStep, packs[k]);
    }
  }
};

// launch(blocks, kernel) starts a kernel.
template <typename Bits, typename Launch>
void apply_mask_bits(const Launch& launch, Bits* y, const Bits* weight, const bool* mask, int64_t numel) {
  using Kernel = ApplyMask<Bits>;
  if (numel == 0) return;
  const bool aligned = are_aligned<kVector<Bits>>(y, weight, mask);
  launch(ceil_div(numel, Kernel::kTile), Kernel{y, weight, mask, numel, aligned});
}

}  // namespace cctorch::cuda
