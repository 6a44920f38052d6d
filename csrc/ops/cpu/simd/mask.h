#pragma once

#include <cstdint>

namespace cctorch::simd {

// A pass counts in the lanes that it compares in: it may not see more than these elements at once.
constexpr int64_t kMostMagnitudes = 16384;

// How many magnitudes are where, seen from an interval [low, high].
template <typename Bits>
struct Split {
  int64_t above;    // > high
  int64_t at_high;  // = high
  int64_t inside;   // > low and < high
  int64_t at_low;   // = low, unless that is high
  Bits largest;
};

// Loops over the bits of at most kMostMagnitudes weights; magnitudes are compared as signed integers, which every
// instruction set can.
template <typename Bits>
struct MaskLoops {
  // Writes the magnitudes inside (low, high) to `inside`, which has room for all.
  Split<Bits> (*split)(const Bits* weight, int64_t n, Bits low, Bits high, Bits* inside);
  // Keeps the magnitudes from `least` on; returns how many equal it.
  int64_t (*mark)(bool* mask, const Bits* weight, int64_t n, Bits least);
  int64_t (*prune)(Bits* pruned, const Bits* weight, int64_t n, Bits least);
  // y = weight where mask, else 0; any number of them.
  void (*apply)(Bits* y, const Bits* weight, const bool* mask, int64_t n);
  // How many are not zero.
  int64_t (*nonzero)(const Bits* weight, int64_t n);
  // Marks n of every m weights, `inner` apart in memory, in `count` groups, a multiple of inner; returns the largest
  // magnitude. Where there is a NaN, that is one, and the marks mean nothing.
  Bits (*groups)(bool* mask, const Bits* weight, int64_t count, int64_t n, int64_t m, int64_t inner);
};

#define CCTORCH_DECLARE_LOOPS(isa)                  \
  namespace isa {                                   \
  template <typename Bits>                          \
  MaskLoops<Bits> mask_loops();                     \
  extern template MaskLoops<uint16_t> mask_loops(); \
  extern template MaskLoops<uint32_t> mask_loops(); \
  extern template MaskLoops<uint64_t> mask_loops(); \
  }

CCTORCH_DECLARE_LOOPS(baseline)
CCTORCH_DECLARE_LOOPS(avx2)
CCTORCH_DECLARE_LOOPS(avx512)
#undef CCTORCH_DECLARE_LOOPS

}  // namespace cctorch::simd
