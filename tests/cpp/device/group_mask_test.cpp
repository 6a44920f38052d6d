#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "tests/cpp/device/floats.h"
#include "tests/cpp/device/launch.h"

#include "kernels/group_mask.cuh"

namespace cctorch::device {
namespace {

namespace group_masks = cuda::group_masks;

// A weight as a matrix in blocks of rows x columns.
template <typename S>
struct Blocks {
  int64_t down, across, rows, columns;
  std::vector<S> values;

  int64_t width() const { return across * columns; }
  int64_t group_of(int64_t element) const { return element / width() / rows * across + element % width() / columns; }
  int64_t groups() const { return down * across; }
};

template <typename S>
Blocks<S> blocks(int64_t down, int64_t across, int64_t rows, int64_t columns, std::vector<S> values) {
  values.resize(down * across * rows * columns);
  return {down, across, rows, columns, std::move(values)};
}

constexpr int64_t kGuard = 3;  // bytes before the masks, which begin where no vector may

template <typename S>
std::vector<std::vector<uint8_t>> masks_of(const std::vector<Blocks<S>>& list, int64_t count, bool channels,
                                           int64_t most_blocks, uint32_t seed, int64_t guard = kGuard,
                                           int* launches = nullptr) {
  std::vector<std::vector<uint8_t>> masks;
  std::vector<group_masks::Weight> weights;
  int64_t elements = 0, groups = 0;
  for (const auto& weight : list) {
    masks.emplace_back(guard + weight.values.size() + 1, uint8_t(0xa5));
    weights.push_back({weight.values.data(), reinterpret_cast<bool*>(masks.back().data() + guard), elements, groups,
                       weight.rows, weight.columns, weight.across});
    elements += static_cast<int64_t>(weight.values.size());
    groups += weight.groups();
  }
  weights.push_back({nullptr, nullptr, elements, groups, 1, 1, 1});
  std::vector<uint64_t> cleared(group_masks::Workspace::cleared_bytes() / 8);
  std::vector<uint64_t> memory(group_masks::Workspace::bytes(groups, static_cast<int64_t>(list.size())) / 8,
                               0xa5a5a5a5a5a5a5a5);
  const auto workspace =
      group_masks::Workspace::at(cleared.data(), memory.data(), groups, static_cast<int64_t>(list.size()));
  group_masks::keep_best<S>(Launch{seed, launches}, weights, count, channels, most_blocks, workspace);
  for (auto& mask : masks) {
    EXPECT_EQ(mask.back(), 0xa5);
    mask.pop_back();
    mask.erase(mask.begin(), mask.begin() + guard);
  }
  return masks;
}

// Brute force: NaN first, then the best channel of every weight, then by score, then by place.
template <typename S>
std::vector<std::vector<uint8_t>> expected_masks(const std::vector<Blocks<S>>& list, int64_t count, bool channels) {
  struct Group {
    double score;
    bool best;
    size_t weight;
    int64_t place;
  };
  const auto before = [](const Group& a, const Group& b) {
    if (std::isnan(a.score) != std::isnan(b.score)) return std::isnan(a.score);
    return a.score > b.score;
  };
  std::vector<Group> all;
  for (size_t k = 0; k < list.size(); ++k) {
    std::vector<double> sums(list[k].groups());
    for (size_t i = 0; i < list[k].values.size(); ++i) {
      const auto value = static_cast<double>(list[k].values[i]);
      sums[list[k].group_of(static_cast<int64_t>(i))] += value * value;
    }
    std::vector<Group> own;
    for (size_t g = 0; g < sums.size(); ++g) {
      const auto size = static_cast<double>(list[k].rows * list[k].columns);
      own.push_back({channels ? sums[g] / size : sums[g], false, k, static_cast<int64_t>(g)});
    }
    if (channels && !own.empty()) std::min_element(own.begin(), own.end(), before)->best = true;
    all.insert(all.end(), own.begin(), own.end());
  }
  std::stable_sort(all.begin(), all.end(), [&](const Group& a, const Group& b) {
    const bool a_nan = std::isnan(a.score) && !a.best, b_nan = std::isnan(b.score) && !b.best;
    if (a_nan || b_nan) return a_nan && !b_nan;
    return a.best != b.best ? a.best : (a.best ? false : before(a, b));
  });
  std::vector<std::vector<uint8_t>> masks;
  for (const auto& weight : list) masks.emplace_back(weight.values.size());
  for (int64_t n = 0; n < count; ++n) {
    const auto& weight = list[all[n].weight];
    for (size_t i = 0; i < weight.values.size(); ++i) {
      if (weight.group_of(static_cast<int64_t>(i)) == all[n].place) masks[all[n].weight][i] = 1;
    }
  }
  return masks;
}

template <typename S>
void expect_masks(const std::vector<Blocks<S>>& list, bool channels, int64_t most_blocks, uint32_t seed) {
  int64_t groups = 0;
  for (const auto& weight : list) groups += weight.groups();
  for (const int64_t count : {int64_t(0), int64_t(1), groups / 3, groups / 2, groups - 1, groups}) {
    if (channels && count < static_cast<int64_t>(list.size())) continue;
    for (const int64_t guard : {int64_t(0), kGuard}) {
      ASSERT_EQ(masks_of(list, count, channels, most_blocks, seed, guard), expected_masks(list, count, channels))
          << count << " of " << groups << ", channels " << channels << ", blocks " << most_blocks;
    }
  }
}

template <typename S>
class GroupMask : public ::testing::Test {};
TYPED_TEST_SUITE(GroupMask, FloatingTypes);

// Channels of all axes, blocks, single elements, one group, rows that do not fill vectors.
TYPED_TEST(GroupMask, EqualsBruteForce) {
  using S = TypeParam;
  const std::vector<Blocks<S>> distinct{
      blocks<S>(1, 64, 1, 9, normal<S>(64 * 9, 1)), blocks<S>(1, 7, 5, 3, normal<S>(105, 2)),
      blocks<S>(4, 9, 2, 4, normal<S>(288, 3)), blocks<S>(1, 1, 1, 700, normal<S>(700, 4)),
      blocks<S>(1, 33, 40, 1, normal<S>(1320, 5))};
  const std::vector<Blocks<S>> tied{blocks<S>(30, 50, 1, 1, few_distinct<S>(1500, 6)),
                                    blocks<S>(8, 40, 2, 2, few_distinct<S>(1280, 7))};
  const std::vector<Blocks<S>> equal{blocks<S>(1, 400, 1, 3, std::vector<S>(1200, S(0))),
                                     blocks<S>(1, 100, 3, 1, std::vector<S>(300, S(0)))};
  for (const auto& list : {distinct, tied, equal}) {
    for (const bool channels : {false, true}) {
      expect_masks(list, channels, 4, 2);
      expect_masks(list, channels, 1, 1);
      expect_masks(list, channels, 100, 3);
    }
  }
}

TYPED_TEST(GroupMask, ExtremesAreInOrderAndNanIsTheLargest) {
  using S = TypeParam;
  using Limits = std::numeric_limits<S>;
  const std::vector<S> values{S(0), Limits::max(), Limits::infinity(), S(1), Limits::quiet_NaN(), Limits::infinity()};
  const std::vector<Blocks<S>> list{blocks<S>(1, 6, 1, 1, values), blocks<S>(1, 3, 1, 2, values),
                                    blocks<S>(1, 4, 1, 1, {S(1), S(2), S(2), S(0)})};
  for (const bool channels : {false, true}) expect_masks(list, channels, 2, 2);
}

// Several launches of scores; and the weights of a ResNet-50 in five launches.
TYPED_TEST(GroupMask, LongLists) {
  using S = TypeParam;
  std::vector<Blocks<S>> list;
  for (unsigned i = 0; i < 150; ++i) list.push_back(blocks<S>(1, 1 + i % 5, 1, 3, few_distinct<S>(3 * (1 + i % 5), i)));
  for (const bool channels : {false, true}) {
    EXPECT_EQ(masks_of(list, 200, channels, 5, 2), expected_masks(list, 200, channels));
  }
  list.resize(54);
  for (const bool channels : {false, true}) {
    int launches = 0;
    masks_of(list, 60, channels, 5, 2, kGuard, &launches);
    EXPECT_EQ(launches, 5);
  }
}

}  // namespace
}  // namespace cctorch::device
