#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>

#include "tests/cpp/device/floats.h"
#include "tests/cpp/device/launch.h"

#include "kernels/mask.cuh"
#include "kernels/select.cuh"

namespace cctorch::device {
namespace {

// Brute force: the `count` largest, NaN first, ties in order.
template <typename T>
std::vector<bool> largest(const std::vector<T>& values, size_t count) {
  std::vector<size_t> order(values.size());
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    const double x = std::abs(static_cast<double>(values[a]));
    const double y = std::abs(static_cast<double>(values[b]));
    return std::isnan(x) ? !std::isnan(y) : x > y;
  });
  std::vector<bool> mask(values.size());
  for (size_t i = 0; i < count; ++i) mask[order[i]] = true;
  return mask;
}

// A weight that starts at an odd element, and bytes for what is made of it that must all be written.
template <typename T, typename Result>
struct Weight {
  std::vector<BitsOf<T>> bits;
  std::unique_ptr<Result[]> result;

  explicit Weight(std::vector<T> values) : result(new Result[values.size() + 1]) {
    values.insert(values.begin(), T(0));
    bits = bits_of(values);
    std::memset(result.get(), 0xa5, values.size() * sizeof(Result));
  }
};

// What the kernels make of the weights, one after the other, in bytes; `blocks` at most.
template <typename Result, typename T>
std::vector<uint8_t> selected(const std::vector<std::vector<T>>& weights, int64_t count, int64_t blocks,
                              uint32_t seed) {
  std::vector<Weight<T, Result>> memory;
  std::vector<cuda::Entry> entries;
  int64_t total = 0;
  for (const auto& values : weights) {
    memory.emplace_back(values);
    entries.push_back({memory.back().bits.data() + 1, memory.back().result.get() + 1, total});
    total += static_cast<int64_t>(values.size());
  }
  entries.push_back({nullptr, nullptr, total});
  const int64_t span = cuda::span_of(total, blocks);
  blocks = ceil_div(total, span);
  const auto bytes = cuda::select::Workspace::bytes(blocks, static_cast<int64_t>(weights.size()));
  const auto scratch = std::make_unique<char[]>(bytes);
  std::memset(scratch.get(), 0xa5, bytes);
  cuda::select::keep_largest<BitsOf<T>, Result>(Launch{seed}, entries, span, count, infinity_bits<T>(),
                                                cuda::select::Workspace::at(scratch.get(), blocks));
  std::vector<uint8_t> results;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto* made = static_cast<const uint8_t*>(entries[i].result);
    results.insert(results.end(), made, made + weights[i].size() * sizeof(Result));
  }
  return results;
}

template <typename T>
std::vector<uint8_t> bytes_of(const std::vector<T>& values) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
  return {bytes, bytes + values.size() * sizeof(T)};
}

template <typename T>
void expect_largest(const std::vector<std::vector<T>>& weights, int64_t count, int64_t blocks, uint32_t seed) {
  std::vector<T> all;
  for (const auto& values : weights) all.insert(all.end(), values.begin(), values.end());
  const auto expected = largest(all, count);
  const std::string what = std::to_string(count) + " of " + std::to_string(all.size()) + ", " + std::to_string(blocks) +
                           " blocks, seed " + std::to_string(seed);
  EXPECT_EQ(selected<bool>(weights, count, blocks, seed), std::vector<uint8_t>(expected.begin(), expected.end()))
      << what;
  for (size_t i = 0; i < all.size(); ++i) all[i] = expected[i] ? all[i] : T(0);
  EXPECT_EQ(selected<BitsOf<T>>(weights, count, blocks, seed), bytes_of(bits_of(all))) << what;
}

template <typename T>
class DeviceMask : public ::testing::Test {};
TYPED_TEST_SUITE(DeviceMask, FloatingTypes);

TYPED_TEST(DeviceMask, MagnitudeMasksEqualBruteForce) {
  using T = TypeParam;
  const std::vector<std::vector<T>> distinct{{}, normal<T>(1500, 1), {}, {}, normal<T>(1, 2), normal<T>(777, 3), {}};
  const std::vector<std::vector<T>> tied{few_distinct<T>(300, 4), few_distinct<T>(1111, 5), {T(0)}};
  const std::vector<std::vector<T>> equal{std::vector<T>(700, T(-0.5)), std::vector<T>(700, T(0.5))};
  for (const auto& weights : {distinct, tied, equal}) {
    int64_t total = 0;
    for (const auto& values : weights) total += static_cast<int64_t>(values.size());
    for (const int64_t count : {int64_t(0), int64_t(1), total / 10, total / 2, total - 1, total}) {
      expect_largest(weights, count, 4, static_cast<uint32_t>(count));
    }
    for (const int64_t blocks : {1, 2, 100}) expect_largest(weights, total / 3, blocks, 1);
  }
}

// Several times what the threads of a block load at once, and a rest.
TYPED_TEST(DeviceMask, PartsOfManyVectors) {
  using T = TypeParam;
  constexpr int64_t kAtOnce = cuda::kInFlight<T> * cuda::kThreads * cuda::kVector<T>;
  for (const auto& values : {normal<T>(5 * kAtOnce + 777, 1), few_distinct<T>(5 * kAtOnce + 777, 2)}) {
    for (const int64_t blocks : {1, 2}) expect_largest<T>({values, {T(1), T(2)}}, kAtOnce, blocks, 3);
  }
}

TYPED_TEST(DeviceMask, ExtremesAreInOrderAndNanIsTheLargest) {
  using T = TypeParam;
  using Limits = std::numeric_limits<T>;
  const std::vector<T> values{T(0),           -Limits::max(), Limits::denorm_min(), Limits::infinity(),
                              Limits::min(),  -T(0.0),        Limits::quiet_NaN(),  -Limits::denorm_min(),
                              -Limits::min(), Limits::max(),  -Limits::infinity(),  -Limits::quiet_NaN()};
  for (int64_t count = 0; count <= static_cast<int64_t>(values.size()); ++count) {
    expect_largest<T>({values}, count, 1, 2);
    expect_largest<T>({{T(1), T(2)}, values, values}, count, 1, 2);
  }
  // Whatever the other bits of a NaN are, the first one is kept.
  auto nans = bits_of<T>({Limits::quiet_NaN(), Limits::quiet_NaN()});
  nans[1] |= 1;
  bool mask[2];
  cuda::mark_groups<BitsOf<T>>(Launch{0}, {{nans.data(), mask, 0, 1}}, {1}, 1, 2, 1, infinity_bits<T>());
  EXPECT_TRUE(mask[0]);
  EXPECT_FALSE(mask[1]);
}

TEST(DeviceMasks, HundredsOfTensors) {
  std::vector<std::vector<float>> weights;
  for (unsigned i = 0; i < 500; ++i) weights.push_back(few_distinct<float>(i % 7, i));
  expect_largest(weights, 600, 3, 2);
}

// More blocks than threads, each with ties before it: the count of a block's ties is summed in several rounds.
TEST(DeviceMasks, ManyBlocks) {
  const std::vector<std::vector<float>> weights{std::vector<float>(300 * cuda::kThreads - 5, 1.0f)};
  expect_largest(weights, int64_t(270) * cuda::kThreads + 3, 300, 1);
}

// The weights of a ResNet-50: at most five launches for a list of its length.
TYPED_TEST(DeviceMask, LaunchesForALongList) {
  using Bits = BitsOf<TypeParam>;
  int launches = 0;
  const Launch launch{0, &launches};
  const auto weight = bits_of(normal<TypeParam>(12, 1));
  std::vector<std::array<bool, 12>> masks(54);
  std::vector<cuda::Entry> entries;
  std::vector<cuda::GroupsEntry> groups;
  for (auto& mask : masks) {
    entries.push_back({weight.data(), mask.data(), static_cast<int64_t>(12 * entries.size())});
    groups.push_back({weight.data(), mask.data(), 0, 1});
  }
  entries.push_back({nullptr, nullptr, 54 * 12});
  const std::unique_ptr<char[]> scratch(new char[cuda::select::Workspace::bytes(3, 54)]);
  cuda::select::keep_largest<Bits, bool>(launch, entries, 256, 300, infinity_bits<TypeParam>(),
                                         cuda::select::Workspace::at(scratch.get(), 3));
  // One pass for each 11 bits of a magnitude; weights in float64 take three more.
  EXPECT_EQ(launches, sizeof(Bits) == 8 ? 8 : (sizeof(Bits) == 4 ? 5 : 4));
  launches = 0;
  cuda::mark_groups<Bits>(launch, groups, std::vector<int64_t>(54, 3), 2, 4, 3, infinity_bits<TypeParam>());
  EXPECT_EQ(launches, 1);
}

struct GroupsCase {
  int64_t outer, inner;
};

template <typename T>
void expect_groups(const std::vector<GroupsCase>& cases, int64_t n, int64_t m, int64_t blocks) {
  std::vector<std::vector<T>> values;
  std::vector<Weight<T, bool>> memory;
  std::vector<cuda::GroupsEntry> entries;
  std::vector<int64_t> groups;
  for (const auto& [outer, inner] : cases) {
    groups.push_back(outer * inner);
    values.push_back(few_distinct<T>(outer * m * inner, static_cast<unsigned>(values.size())));
    if (!values.back().empty()) values.back()[0] = std::numeric_limits<T>::quiet_NaN();
    memory.emplace_back(values.back());
    entries.push_back({memory.back().bits.data() + 1, memory.back().result.get() + 1, 0, inner});
  }
  cuda::mark_groups<BitsOf<T>>(Launch{2}, entries, groups, n, m, blocks, infinity_bits<T>());
  for (size_t k = 0; k < cases.size(); ++k) {
    const int64_t inner = cases[k].inner;
    for (int64_t group = 0; group < groups[k]; ++group) {
      std::vector<T> members;
      std::vector<bool> marked;
      for (int64_t i = 0; i < m; ++i) {
        const int64_t at = (group / inner * m + i) * inner + group % inner;
        members.push_back(values[k][at]);
        marked.push_back(memory[k].result[at + 1]);
      }
      ASSERT_EQ(marked, largest(members, n)) << n << " of " << m << ", group " << group << " of weight " << k;
    }
  }
}

TYPED_TEST(DeviceMask, GroupsEqualBruteForce) {
  using T = TypeParam;
  expect_groups<T>({{300, 1}, {0, 3}, {5, 63}, {1, 1}, {0, 1}}, 2, 4, 3);
  expect_groups<T>({{7, 9}}, 3, 8, 1);
  expect_groups<T>({{257, 1}, {3, 2}}, 1, 1, 100);
  expect_groups<T>({{0, 1}}, 1, 2, 4);
  std::vector<GroupsCase> many;
  for (int64_t i = 0; i < 300; ++i) many.push_back({i % 4, 1 + i % 3});
  expect_groups<T>(many, 1, 2, 5);
}

TYPED_TEST(DeviceMask, ApplyMaskKeepsOrClearsEveryBit) {
  using Bits = BitsOf<TypeParam>;
  constexpr int64_t kTile = cuda::ApplyMask<Bits>::kTile;
  for (const int64_t numel : {int64_t(0), int64_t(1), kTile - 1, 2 * kTile + 77}) {
    const auto bits = bits_of(normal<TypeParam>(numel + 1, 1));
    const std::unique_ptr<bool[]> mask(new bool[numel + 1]);
    for (int64_t i = 0; i <= numel; ++i) mask[i] = i % 3 == 1;
    // Where in memory the weights, the mask and the result begin.
    for (const auto& [from, kept, to] : {std::array{0, 0, 0}, {1, 0, 0}, {0, 1, 0}, {0, 0, 1}, {1, 1, 1}}) {
      std::vector<Bits> y(numel + 2, Bits(0xa5));
      cuda::apply_mask_bits(Launch{2}, y.data() + to, bits.data() + from, mask.get() + kept, numel);
      for (int64_t i = 0; i < numel; ++i) {
        ASSERT_EQ(y[to + i], mask[kept + i] ? bits[from + i] : Bits(0)) << i << " of " << numel;
      }
      ASSERT_EQ(y[to + numel], Bits(0xa5));
    }
  }
}

}  // namespace
}  // namespace cctorch::device
