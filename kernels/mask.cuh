#pragma once

#include "csrc/ops/formula/mask.h"
#include "kernels/block.cuh"

namespace cctorch::cuda {

struct NoShared {};

// Marks the n largest of every m weights, `inner` apart in memory; one thread for each group.
template <typename Bits>
struct MarkGroups {
  using Shared = NoShared;

  formula::MagnitudeOrNan<Bits> key;
  const Bits* weight;
  bool* mask;
  int64_t groups;
  int64_t n;
  int64_t m;
  int64_t inner;

  __device__ void operator()(Shared&) const {
    const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (group >= groups) return;
    const int64_t offset = group / inner * m * inner + group % inner;
    formula::mark_group(weight + offset, mask + offset, n, m, inner, key);
  }
};

// The bits of the weights where mask, else 0.
template <typename Bits>
struct ApplyMask {
  using Shared = NoShared;
  static constexpr int kPerThread = 4;
  static constexpr int64_t kPerBlock = kPerThread * kThreads;

  Bits* y;
  const Bits* weight;
  const bool* mask;
  int64_t numel;

  __device__ void operator()(Shared&) const {
    const int64_t first = blockIdx.x * kPerBlock + threadIdx.x;
    // All loads are on their way before the first store.
    Bits values[kPerThread];
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t i = first + k * kThreads;
      if (i >= numel) break;
      const Bits value = weight[i];
      values[k] = mask[i] ? value : Bits(0);
    }
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t i = first + k * kThreads;
      if (i < numel) y[i] = values[k];
    }
  }
};

}  // namespace cctorch::cuda
