#pragma once

#include <cstdint>

namespace cctorch::simd {

// The generator of at::rand on CPU: 624 words at a time, of which `used` are gone.
struct Mt19937 {
  static constexpr int64_t kWords = 624;
  uint32_t state[kWords];
  int64_t used;
};

// Draws the next n words; skips them.
struct Mt19937Loops {
  void (*draw)(Mt19937& generator, uint32_t* words, int64_t n);
  void (*skip)(Mt19937& generator, int64_t n);
};

namespace baseline {
Mt19937Loops mt19937();
}
namespace avx2 {
Mt19937Loops mt19937();
}
namespace avx512 {
Mt19937Loops mt19937();
}

}  // namespace cctorch::simd
