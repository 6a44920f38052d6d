#include <ATen/ATen.h>
#include <cctorch/mask.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "csrc/ops/cpu/isa.h"
#include "csrc/ops/cpu/simd/mask.h"
#include "csrc/ops/mask.h"

namespace cctorch {
namespace {

TEST(Mask, KeptCountIsThatOfTheDecimalFraction) {
  EXPECT_EQ(kept_count(0.9, 10), 1);
  EXPECT_EQ(kept_count(0.7, 10), 3);
  EXPECT_EQ(kept_count(0.07, 100), 93);
  EXPECT_EQ(kept_count(0.0, 7), 7);
  EXPECT_EQ(kept_count(1.0, 7), 0);
  EXPECT_EQ(kept_count(0.5, 7), 3);
  for (int64_t percent = 0; percent <= 100; ++percent) {
    EXPECT_EQ(kept_count(static_cast<double>(percent) / 100, 25'000'000), (100 - percent) * 250'000) << percent;
  }
}

TEST(Mask, GradientReachesDroppedWeights) {
  const auto weight = at::randn({4, 4}).requires_grad_();
  const auto mask = channel_masks({weight}, 0.5)[0];
  EXPECT_EQ(mask.sum().item<int64_t>(), 8);
  const auto y = apply_mask(weight, mask);
  EXPECT_TRUE(y.equal(weight * mask));
  y.sum().backward();
  EXPECT_TRUE(weight.grad().equal(at::ones({4, 4})));
}

// Every instruction set that this processor has does the same, whichever is picked.
template <typename Bits>
std::vector<simd::MaskLoops<Bits>> all_loops() {
  std::vector<simd::MaskLoops<Bits>> loops{simd::baseline::mask_loops<Bits>()};
  if (isa() >= Isa::kAvx2) loops.push_back(simd::avx2::mask_loops<Bits>());
  if (isa() >= Isa::kAvx512) loops.push_back(simd::avx512::mask_loops<Bits>());
  return loops;
}

template <typename Bits>
void expect_loops_are_right() {
  std::mt19937_64 random(3);
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits(0)) >> 1;
  for (const int64_t n : {0, 1, 15, 16, 17, 100, 1000, 16384}) {
    std::vector<Bits> weight(n);
    for (Bits& bits : weight) bits = static_cast<Bits>(random() % 9 * (kMagnitude / 4));
    const Bits low = kMagnitude / 4;
    const Bits high = 3 * (kMagnitude / 4);
    for (const auto& loops : all_loops<Bits>()) {
      simd::Split<Bits> expected{};
      std::vector<Bits> between;
      int64_t equal = 0;
      for (const Bits bits : weight) {
        const Bits key = bits & kMagnitude;
        expected.above += key > high;
        expected.at_high += key == high;
        expected.at_low += key == low;
        equal += key == high;
        expected.largest = std::max(expected.largest, key);
        if (key > low && key < high) between.push_back(key);
      }
      std::vector<Bits> inside(n);
      const auto split = loops.split(weight.data(), n, low, high, inside.data());
      inside.resize(split.inside);
      EXPECT_EQ(inside, between);
      EXPECT_EQ(split.above, expected.above);
      EXPECT_EQ(split.at_high, expected.at_high);
      EXPECT_EQ(split.at_low, expected.at_low);
      EXPECT_EQ(split.largest, expected.largest);
      EXPECT_EQ(loops.split(weight.data(), n, high, high, inside.data()).at_low, 0);

      const auto mask = std::make_unique<bool[]>(n + 1);
      std::vector<Bits> pruned(n), applied(n);
      EXPECT_EQ(loops.mark(mask.get(), weight.data(), n, high), equal);
      EXPECT_EQ(loops.prune(pruned.data(), weight.data(), n, high), equal);
      loops.apply(applied.data(), weight.data(), mask.get(), n);
      for (int64_t i = 0; i < n; ++i) {
        const bool kept = (weight[i] & kMagnitude) >= high;
        ASSERT_EQ(mask[i], kept);
        ASSERT_EQ(pruned[i], kept ? weight[i] : Bits(0));
        ASSERT_EQ(applied[i], pruned[i]);
      }
    }
  }
}

TEST(Mask, LoopsOfEveryInstructionSet) {
  expect_loops_are_right<uint16_t>();
  expect_loops_are_right<uint32_t>();
  expect_loops_are_right<uint64_t>();
}

TEST(Mask, PruningKeepsTheLargestOfTheList) {
  const auto a = at::tensor({1.0f, -4.0f}).requires_grad_();
  const auto pruned = magnitude_prune({a, at::tensor({2.0f, 3.0f})}, 0.5);
  EXPECT_TRUE(pruned[0].equal(at::tensor({0.0f, -4.0f})));
  EXPECT_TRUE(pruned[1].equal(at::tensor({0.0f, 3.0f})));
  pruned[0].sum().backward();
  EXPECT_TRUE(a.grad().equal(at::ones({2})));
}

}  // namespace
}  // namespace cctorch
