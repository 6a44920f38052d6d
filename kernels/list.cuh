#pragma once

#include <algorithm>
#include <vector>

#include "csrc/ops/formula/layout.h"
#include "kernels/block.cuh"

// Many tensors in one launch: every block finds its part of all of them.
namespace cctorch::cuda {

// A weight and what is made of it, both row-major; `first` is the position of element 0 in the concatenation of all
// weights.
struct Entry {
  const void* weight;
  void* result;
  int64_t first;
};

// Of `count` items that begin at first(i), the last one that begins at or before `position`; empty ones are behind
// others with the same first.
template <typename First>
__device__ int64_t last_from(int64_t count, int64_t position, const First& first) {
  int64_t low = 0;
  for (int64_t high = count; high - low > 1;) {
    const int64_t middle = (low + high) / 2;
    (first(middle) <= position ? low : high) = middle;
  }
  return low;
}

// The list, ended by an item with first = total. Each block takes `span` elements of the concatenation, so blocks are
// in the order of the elements.
template <typename Item>
struct List {
  const Item* entries;
  int64_t count;
  int64_t total;
  int64_t span;

  // visit(entry, begin, end) for every piece of a weight that belongs to the block
  template <typename Visit>
  __device__ void for_each_piece(unsigned block, const Visit& visit) const {
    int64_t begin = block * span;
    const int64_t end = std::min(begin + span, total);
    if (begin >= end) return;
    for (int64_t e = last_from(count, begin, [&](int64_t i) { return entries[i].first; }); begin < end; ++e) {
      const int64_t last = std::min(end, entries[e + 1].first);
      visit(entries[e], begin - entries[e].first, last - entries[e].first);
      begin = last;
    }
  }
};

// One kernel for the tensors of a list: each of its blocks is one of the blocks of one of the bodies, which know what
// tensor is theirs. They travel as an argument, so nothing waits for a copy, and a captured graph keeps them.
template <typename Body>
struct Together {
  using Shared = typename Body::Shared;
  struct Item {
    Body body;
    int64_t first;  // block
  };
  static constexpr int64_t kItems = (4096 - 2 * sizeof(int64_t)) / sizeof(Item);  // an argument has 4 KB

  int64_t count;
  Item items[kItems];

  __device__ void operator()(Shared& shared) const {
    const Item& item = items[last_from(count, blockIdx.x, [&](int64_t i) { return items[i].first; })];
    item.body(shared, blockIdx.x - item.first);
  }
};

// Starts body.blocks() blocks of each body, of which none has none: as few kernels as their arguments allow.
template <typename Launch, typename Body>
void launch_together(const Launch& launch, const std::vector<Body>& bodies) {
  using Kernel = Together<Body>;
  static_assert(sizeof(Kernel) <= 4096);
  const auto size = static_cast<int64_t>(bodies.size());
  for (int64_t begin = 0; begin < size; begin += Kernel::kItems) {
    Kernel kernel{std::min(Kernel::kItems, size - begin), {}};
    int64_t blocks = 0;
    for (int64_t i = 0; i < kernel.count; ++i) {
      kernel.items[i] = {bodies[begin + i], blocks};
      blocks += bodies[begin + i].blocks();
    }
    launch(blocks, kernel);
  }
}

// The elements of each of at most `blocks` blocks, which are then ceil(total / span); whole rows of threads.
inline int64_t span_of(int64_t total, int64_t blocks) { return ceil_div(ceil_div(total, kThreads), blocks) * kThreads; }

}  // namespace cctorch::cuda
