#include "csrc/ops/cpu/simd/mt19937.h"

namespace cctorch::simd::CCTORCH_ISA {
namespace {

constexpr int64_t kWords = Mt19937::kWords;
constexpr int64_t kShift = 397;

uint32_t twisted(uint32_t upper, uint32_t lower) {
  const uint32_t mixed = (upper & 0x80000000U) | (lower & 0x7fffffffU);
  return (mixed >> 1) ^ ((0U - (lower & 1U)) & 0x9908b0dfU);
}

void next_state(uint32_t* p) {
#pragma omp simd
  for (int64_t i = 0; i < kWords - kShift; ++i) p[i] = p[i + kShift] ^ twisted(p[i], p[i + 1]);
  // What is read of the new words was written 227 before.
#pragma omp simd safelen(64)
  for (int64_t i = kWords - kShift; i < kWords - 1; ++i) p[i] = p[i + kShift - kWords] ^ twisted(p[i], p[i + 1]);
  p[kWords - 1] = p[kShift - 1] ^ twisted(p[kWords - 1], p[0]);
}

// function(state, done, count) for each run of the next n words
template <typename Function>
void for_each_run(Mt19937& generator, int64_t n, const Function& function) {
  for (int64_t done = 0; done < n;) {
    if (generator.used == kWords) {
      next_state(generator.state);
      generator.used = 0;
    }
    const int64_t left = kWords - generator.used;
    const int64_t count = n - done < left ? n - done : left;
    function(generator.state + generator.used, done, count);
    generator.used += count;
    done += count;
  }
}

void draw(Mt19937& generator, uint32_t* words, int64_t n) {
  for_each_run(generator, n, [&](const uint32_t* state, int64_t done, int64_t count) {
    uint32_t* to = words + done;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      uint32_t y = state[i];
      y ^= y >> 11;
      y ^= (y << 7) & 0x9d2c5680U;
      y ^= (y << 15) & 0xefc60000U;
      to[i] = y ^ (y >> 18);
    }
  });
}

void skip(Mt19937& generator, int64_t n) {
  for_each_run(generator, n, [](const uint32_t*, int64_t, int64_t) {});
}

}  // namespace

Mt19937Loops mt19937() { return {&draw, &skip}; }

}  // namespace cctorch::simd::CCTORCH_ISA
