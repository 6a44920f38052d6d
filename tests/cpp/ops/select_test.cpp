#include "csrc/ops/cpu/select.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <random>
#include <vector>

namespace cctorch::cpu::select {
namespace {

template <typename Bits>
void expect_selected(const std::vector<Bits>& keys, int64_t count) {
  std::vector<Piece<Bits>> pieces;
  append(pieces, keys.data(), nullptr, static_cast<int64_t>(keys.size()), 0);
  const auto selected = largest(pieces, count);
  auto sorted = keys;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const Bits threshold = sorted[count - 1];
  EXPECT_EQ(selected.threshold, threshold) << count;
  EXPECT_EQ(selected.wanted, std::count(sorted.begin(), sorted.begin() + count, threshold)) << count;
  EXPECT_EQ(selected.largest, sorted[0]) << count;
}

template <typename Bits>
std::vector<Bits> random_keys(size_t size, Bits most) {
  std::mt19937 random(1);
  std::vector<Bits> keys(size);
  for (Bits& key : keys) key = static_cast<Bits>(random() % most);
  return keys;
}

constexpr int64_t kTotal = 300'000;

TEST(Select, ASampleIsSpreadAndStaysInRange) {
  for (const int64_t total : {int64_t(16385), kTotal, int64_t(25'502'912)}) {
    const int64_t size = sample_size(total);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t position = sample_position(i, size, total);
      ASSERT_GE(position, i * total / size);
      ASSERT_LT(position, (i + 1) * total / size);
    }
  }
}

// The sample says nothing about the rest: the threshold is above the bracket, or below it.
TEST(Select, MisleadingSamples) {
  auto low = random_keys<uint32_t>(kTotal, 1'000'000);
  for (uint32_t& key : low) key += 1'000'000;
  auto high = low;
  const int64_t size = sample_size(kTotal);
  for (int64_t i = 0; i < size; ++i) {
    low[sample_position(i, size, kTotal)] = static_cast<uint32_t>(i);
    high[sample_position(i, size, kTotal)] = static_cast<uint32_t>(5'000'000 + i);
  }
  for (const int64_t count : {int64_t(1), size, kTotal / 5, kTotal / 2, kTotal - size, kTotal}) {
    expect_selected(low, count);
    expect_selected(high, count);
  }
}

TEST(Select, EveryRankOfFewDistinctKeys) {
  const auto keys = random_keys<uint16_t>(20'000, 7);
  for (int64_t count = 1; count <= 20'000; count += 199) expect_selected(keys, count);
  auto wide = random_keys<uint64_t>(40'000, 1'000'000'007);
  for (uint64_t& key : wide) key <<= 32;
  for (int64_t count = 1; count <= 40'000; count += 3999) expect_selected(wide, count);
}

}  // namespace
}  // namespace cctorch::cpu::select
