#pragma once

#include <xmmintrin.h>

#include <cstdint>

namespace cctorch::simd {

enum class Stores { kThroughCaches, kAroundCaches };

// For results of so many bytes in all: larger ones would not wait in a cache for their reader anyway.
inline Stores stores_for(int64_t bytes) {
  constexpr int64_t kMostCached = int64_t{16} << 20;
  return bytes > kMostCached ? Stores::kAroundCaches : Stores::kThroughCaches;
}

// Its end comes before another thread hears that this one is done: what went around the caches has arrived by then.
class Fence {
 public:
  explicit Fence(Stores stores) : stores_(stores) {}
  Fence(const Fence&) = delete;
  Fence& operator=(const Fence&) = delete;
  ~Fence() {
    if (stores_ == Stores::kAroundCaches) _mm_sfence();
  }

 private:
  Stores stores_;
};

}  // namespace cctorch::simd
