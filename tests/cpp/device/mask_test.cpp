#include <gtest/gtest.h>

#include <algorithm>
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

// A weight that starts at an odd element, and bytes for its mask that must all be written.
template <typename T>
struct Weight {
  std::vector<BitsOf<T>> bits;
  std::unique_ptr<bool[]> mask;

  explicit Weight(std::vector<T> values) : mask(new bool[values.size() + 1]) {
    values.insert(values.begin(), T(0));
    bits = bits_of(values);
    std::memset(mask.get(), 0xa5, values.size());
  }
};

// The masks that the kernels make of the weights, one after the other; `blocks` at most.
template <typename T>
std::vector<int> selected(const std::vector<std::vector<T>>& weights, int64_t count, int64_t blocks, uint32_t seed) {
  std::vector<Weight<T>> memory;
  std::vector<cuda::select::Entry> entries;
  int64_t total = 0;
  for (const auto& values : weights) {
    memory.emplace_back(values);
    entries.push_back({memory.back().bits.data() + 1, memory.back().mask.get() + 1, total});
    total += static_cast<int64_t>(values.size());
  }
  entries.push_back({nullptr, nullptr, total});
  const int64_t span = cuda::select::span_of(total, blocks);
  blocks = ceil_div(total, span);
  const auto bytes = cuda::select::Workspace::bytes(blocks, static_cast<int64_t>(weights.size()));
  const auto scratch = std::make_unique<char[]>(bytes);
  std::memset(scratch.get(), 0xa5, bytes);
  cuda::select::mark_largest<BitsOf<T>>(Launch{seed}, entries, span, count, infinity_bits<T>(),
                                        cuda::select::Workspace::at(scratch.get(), blocks));
  std::vector<int> marked;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto* bytes_of_mask = reinterpret_cast<const uint8_t*>(entries[i].mask);
    marked.insert(marked.end(), bytes_of_mask, bytes_of_mask + weights[i].size());
  }
  return marked;
}

template <typename T>
void expect_largest(const std::vector<std::vector<T>>& weights, int64_t count, int64_t blocks, uint32_t seed) {
  std::vector<T> all;
  for (const auto& values : weights) all.insert(all.end(), values.begin(), values.end());
  const auto expected = largest(all, count);
  EXPECT_EQ(selected(weights, count, blocks, seed), std::vector<int>(expected.begin(), expected.end()))
      << count << " of " << all.size() << ", " << blocks << " blocks, seed " << seed;
}

template <typename T>
std::vector<T> normal(size_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> distribution;
  std::vector<T> values(size);
  for (T& value : values) value = static_cast<T>(distribution(random));
  return values;
}

template <typename T>
std::vector<T> few_distinct(size_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<T> values(size);
  for (T& value : values) value = static_cast<T>((static_cast<double>(random() % 9) - 4) / 4);
  return values;
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
  Launch{0}(1, cuda::MarkGroups<BitsOf<T>>{{infinity_bits<T>()}, nans.data(), mask, 1, 1, 2, 1});
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

TYPED_TEST(DeviceMask, GroupsEqualBruteForce) {
  using T = TypeParam;
  struct Case {
    int64_t outer, n, m, inner;
  };
  for (const auto& [outer, n, m, inner] :
       {Case{300, 2, 4, 1}, Case{5, 1, 2, 63}, Case{7, 3, 8, 9}, Case{3, 4, 4, 1}, Case{257, 1, 1, 1}}) {
    auto values = few_distinct<T>(outer * m * inner, static_cast<unsigned>(m));
    values[0] = std::numeric_limits<T>::quiet_NaN();
    const auto bits = bits_of(values);
    const std::unique_ptr<bool[]> mask(new bool[values.size()]);
    std::memset(mask.get(), 0xa5, values.size());
    const int64_t groups = outer * inner;
    Launch{2}(ceil_div(groups, cuda::kThreads),
              cuda::MarkGroups<BitsOf<T>>{{infinity_bits<T>()}, bits.data(), mask.get(), groups, n, m, inner});
    for (int64_t group = 0; group < groups; ++group) {
      std::vector<T> members;
      std::vector<bool> marked;
      for (int64_t i = 0; i < m; ++i) {
        const int64_t at = (group / inner * m + i) * inner + group % inner;
        members.push_back(values[at]);
        marked.push_back(mask[at]);
      }
      ASSERT_EQ(marked, largest(members, n)) << n << " of " << m << ", group " << group << ", inner " << inner;
    }
  }
}

TYPED_TEST(DeviceMask, ApplyMaskKeepsOrClearsEveryBit) {
  using Bits = BitsOf<TypeParam>;
  using Kernel = cuda::ApplyMask<Bits>;
  for (const int64_t numel : {int64_t(1), Kernel::kPerBlock - 1, 2 * Kernel::kPerBlock + 77}) {
    auto values = normal<TypeParam>(numel, 1);
    values[0] = std::numeric_limits<TypeParam>::quiet_NaN();
    const auto bits = bits_of(values);
    const std::unique_ptr<bool[]> mask(new bool[numel]);
    for (int64_t i = 0; i < numel; ++i) mask[i] = i % 3 == 1;
    std::vector<Bits> y(numel, Bits(0xa5));
    Launch{2}(ceil_div(numel, Kernel::kPerBlock), Kernel{y.data(), bits.data(), mask.get(), numel});
    for (int64_t i = 0; i < numel; ++i) ASSERT_EQ(y[i], i % 3 == 1 ? bits[i] : Bits(0)) << i << " of " << numel;
  }
}

}  // namespace
}  // namespace cctorch::device
