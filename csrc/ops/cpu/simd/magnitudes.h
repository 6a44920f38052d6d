#pragma once

#include <cstdint>

#include "csrc/ops/cpu/simd/loops.h"

namespace cctorch::simd {

struct Magnitudes {
  double sum;  // not finite if one of them is not
  double largest;
};

// How many are above a threshold, and what they add up to.
struct Tail {
  double count;
  double sum;
};

constexpr int kTails = 8;

struct Outside {
  Tail above;
  double below;  // sum
};

// Passes over the magnitudes of numbers of one storage type.
struct MagnitudeLoops {
  Magnitudes (*summary)(const void* x, int64_t n);
  // What is above each of kTails thresholds, added to `tails`; sums are rounded to about 1e-5 unless x is float64.
  void (*tails)(const void* x, int64_t n, const double* thresholds, Tail* tails);
  // What is above `high` and what is up to `low`, in float64, is added to `outside`. The others go to `inside`, which
  // has room for n and two vectors more; returns how many. `inside` may be x, of float64.
  int64_t (*cut)(const void* x, int64_t n, double low, double high, Outside& outside, double* inside);
  // y = the sign of x (that of 0 is positive) times `high` where |x| > bound, times `low` elsewhere. Without -0.
  void (*replace)(void* y, const void* x, int64_t n, double bound, double high, double low, Stores stores);
};

// For each of at most so many numbers `ranks` says what of them is above it. It reads them in whole vectors of
// kRankLanes.
constexpr int64_t kMostRanks = 64;
constexpr int64_t kRankLanes = 16;

#define CCTORCH_DECLARE_LOOPS(isa)                     \
  namespace isa {                                      \
  MagnitudeLoops magnitude_loops(Storage storage);     \
  void ranks(const double* x, int64_t m, Tail* tails); \
  }

CCTORCH_DECLARE_LOOPS(baseline)
CCTORCH_DECLARE_LOOPS(avx2)
CCTORCH_DECLARE_LOOPS(avx512)
#undef CCTORCH_DECLARE_LOOPS

}  // namespace cctorch::simd
