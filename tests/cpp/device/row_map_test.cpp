#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "tests/cpp/device/floats.h"
#include "tests/cpp/device/launch.h"

#include "kernels/row_map.cuh"

namespace cctorch::device {
namespace {

template <typename S>
struct Weight {
  std::vector<S> from;  // behind `skipped` elements
  std::vector<S> to;
  std::vector<Math<S>> scales;
  int64_t size;
  int64_t skipped = 0;
};

template <typename S>
std::vector<Weight<S>> random_weights(int64_t count) {
  const Math<S> unwritten = std::numeric_limits<Math<S>>::quiet_NaN();
  std::mt19937 random(3);
  std::normal_distribution<double> normal;
  std::vector<Weight<S>> weights;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t rows = 1 + i % 3;
    const int64_t size = i % 42 == 21 ? 9001 : (i % 5 == 0 ? 1 : (i % 7 == 0 ? 700 : 3 + 9 * i));
    const int64_t skipped = i % 4 == 3 ? 1 : 0;
    Weight<S> weight{std::vector<S>(skipped + rows * size), std::vector<S>(rows * size, S(unwritten)),
                     std::vector<Math<S>>(rows, unwritten), size, skipped};
    for (S& value : weight.from) value = static_cast<S>(normal(random));
    weights.push_back(std::move(weight));
  }
  return weights;
}

template <typename S, typename Rule>
int map_rows(std::vector<Weight<S>>& weights, const Rule& rule, uint32_t seed, bool with_parameters) {
  int launches = 0;
  std::vector<cuda::row_map::Entry> entries;
  int64_t first = 0;
  for (auto& weight : weights) {
    entries.push_back({weight.from.data() + weight.skipped, weight.to.data(),
                       with_parameters ? weight.scales.data() : nullptr, weight.size, first});
    first += static_cast<int64_t>(weight.scales.size());
  }
  entries.push_back({nullptr, nullptr, nullptr, 0, first});
  cuda::row_map::map_rows(Launch{seed, &launches}, entries, rule);
  return launches;
}

template <typename S>
int quantize(std::vector<Weight<S>>& weights, int64_t qmax, uint32_t seed) {
  using T = Math<S>;
  const cuda::row_map::OnLargest<S, T> rule{formula::FakeQuantWeights<T>::with_qmax(qmax), infinity_bits<S>()};
  return map_rows(weights, rule, seed, true);
}

// check(row, its size, what became of it) for each row.
template <typename S, typename Check>
void for_each_row(const std::vector<Weight<S>>& weights, const Check& check) {
  for (const auto& weight : weights) {
    for (size_t row = 0; row < weight.scales.size(); ++row) {
      check(weight.from.data() + weight.skipped + row * weight.size, weight.size, weight.to.data() + row * weight.size);
    }
  }
}

template <typename S>
class RowMap : public ::testing::Test {};
TYPED_TEST_SUITE(RowMap, FloatingTypes);

// More weights than one launch takes, of rows shorter and longer than what a block loads at once, some that do not
// begin at a vector.
TYPED_TEST(RowMap, EqualsPlainLoops) {
  for (const uint32_t seed : {0u, 1u, 7u}) {
    auto weights = random_weights<TypeParam>(130);
    quantize(weights, 7, seed);
    for (const auto& weight : weights) {
      for (size_t row = 0; row < weight.scales.size(); ++row) {
        const TypeParam* from = weight.from.data() + weight.skipped + row * weight.size;
        double largest = 0;
        for (int64_t i = 0; i < weight.size; ++i) largest = std::max(largest, std::abs(static_cast<double>(from[i])));
        const auto scale = static_cast<Math<TypeParam>>(largest) / 7;
        ASSERT_EQ(weight.scales[row], scale);
        for (int64_t i = 0; i < weight.size; ++i) {
          const auto expected = scale * std::nearbyint(static_cast<Math<TypeParam>>(from[i]) / scale);
          ASSERT_EQ(weight.to[row * weight.size + i], static_cast<TypeParam>(expected));
        }
      }
    }
  }
}

TYPED_TEST(RowMap, LaunchesOnceForTheWeightsOfAResNet50) {
  auto weights = random_weights<TypeParam>(54);
  EXPECT_EQ(quantize(weights, 7, 0), 1);
}

TYPED_TEST(RowMap, NanHasNoSayInTheScale) {
  std::vector<Weight<TypeParam>> weights{
      {{TypeParam(NAN), TypeParam(-14), TypeParam(5)}, std::vector<TypeParam>(3), std::vector<Math<TypeParam>>(1), 3}};
  quantize(weights, 7, 0);
  EXPECT_EQ(weights[0].scales[0], 2);
  EXPECT_TRUE(std::isnan(static_cast<double>(weights[0].to[0])));
  EXPECT_EQ(static_cast<double>(weights[0].to[2]), 4);  // 2.5 steps: to the even one
}

TYPED_TEST(RowMap, SignsTakeTheMeanMagnitude) {
  auto weights = random_weights<TypeParam>(130);
  weights[0].from = {TypeParam(-0.0)};
  map_rows(weights, cuda::row_map::ScaledSigns<TypeParam, Math<TypeParam>>{}, 7, false);
  for_each_row(weights, [](const TypeParam* from, int64_t size, const TypeParam* to) {
    long double sum = 0;
    for (int64_t i = 0; i < size; ++i) sum += std::abs(static_cast<long double>(from[i]));
    const auto mean = static_cast<double>(static_cast<TypeParam>(static_cast<double>(sum / size)));
    // A sum rounds at each addition: of a thread's elements, its warp's threads and the block's warps, at most 64.
    const double rounding = mean * (static_cast<double>(std::numeric_limits<TypeParam>::epsilon()) +
                                    64 * std::numeric_limits<double>::epsilon());
    for (int64_t i = 0; i < size; ++i) {
      const bool negative = static_cast<double>(from[i]) < 0;
      ASSERT_NEAR(static_cast<double>(to[i]), negative ? -mean : mean, rounding);
      ASSERT_EQ(static_cast<double>(to[i]),
                negative ? -std::abs(static_cast<double>(to[0])) : std::abs(static_cast<double>(to[0])));
    }
  });
}

TYPED_TEST(RowMap, PowersOfTwoEndAtTheLargest) {
  using T = Math<TypeParam>;
  auto weights = random_weights<TypeParam>(60);
  weights[1].from.assign(weights[1].from.size(), TypeParam(0));
  // 3 bits: the largest, a half and a quarter of it.
  const T smallest = std::ldexp(T(1), -2);
  map_rows(weights, cuda::row_map::PowersOfTwo<TypeParam, T>{{T(1), smallest, T(1)}}, 1, false);
  for_each_row(weights, [](const TypeParam* from, int64_t size, const TypeParam* to) {
    double largest = 0;
    for (int64_t i = 0; i < size; ++i) largest = std::max(largest, std::abs(static_cast<double>(from[i])));
    if (largest == 0) {
      for (int64_t i = 0; i < size; ++i) ASSERT_EQ(static_cast<double>(to[i]), 0);
      return;
    }
    const double top = std::exp2(std::floor(std::log2(largest * 4 / 3)));
    for (int64_t i = 0; i < size; ++i) {
      const double x = std::abs(static_cast<double>(from[i])) / top;
      // 0, 1/4, 1/2 and 1, of two as near the even one
      const double level = x <= 0.125 ? 0 : (x < 0.375 ? 0.25 : (x < 0.75 ? 0.5 : 1));
      ASSERT_EQ(std::abs(static_cast<double>(to[i])), static_cast<double>(static_cast<TypeParam>(level * top)));
    }
  });
}

TYPED_TEST(RowMap, ARowWithNanOrInfinityHasNoPowers) {
  using T = Math<TypeParam>;
  for (const double x : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
    std::vector<Weight<TypeParam>> weights{
        {{TypeParam(x), TypeParam(0.9), TypeParam(-3)}, std::vector<TypeParam>(3), std::vector<T>(1), 3}};
    map_rows(weights, cuda::row_map::PowersOfTwo<TypeParam, T>{{T(1), T(0.5), T(1)}}, 0, false);
    EXPECT_EQ(static_cast<double>(weights[0].to[1]), 1);
    EXPECT_EQ(static_cast<double>(weights[0].to[2]), -1);
  }
}

}  // namespace
}  // namespace cctorch::device
