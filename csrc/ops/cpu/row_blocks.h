#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "csrc/ops/formula/layout.h"

// A long row in blocks for all threads, whose results are put together in order: they do not depend on how many threads
// there are.
namespace cctorch::cpu {

constexpr int64_t kRowBlock = 65536;

inline int64_t row_blocks(int64_t n) { return std::max<int64_t>(1, ceil_div(n, kRowBlock)); }

// function(block, begin, size)
template <typename Function>
void for_each_block(int64_t n, const Function& function) {
  if (n <= kRowBlock) return function(int64_t{0}, int64_t{0}, n);
  at::parallel_for(0, row_blocks(n), 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kRowBlock;
      function(block, begin, std::min(kRowBlock, n - begin));
    }
  });
}

}  // namespace cctorch::cpu
