#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "tests/cpp/device/floats.h"
#include "tests/cpp/device/launch.h"

#include "kernels/fake_quant_weights.cuh"

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

template <typename S>
int quantize(std::vector<Weight<S>>& weights, int64_t qmax, uint32_t seed) {
  int launches = 0;
  std::vector<cuda::quantize_rows::Entry> entries;
  int64_t first = 0;
  for (auto& weight : weights) {
    entries.push_back(
        {weight.from.data() + weight.skipped, weight.to.data(), weight.scales.data(), weight.size, first});
    first += static_cast<int64_t>(weight.scales.size());
  }
  entries.push_back({nullptr, nullptr, nullptr, 0, first});
  cuda::quantize_rows::quantize<S, Math<S>>(Launch{seed, &launches}, entries, qmax, infinity_bits<S>());
  return launches;
}

template <typename S>
class FakeQuantWeights : public ::testing::Test {};
TYPED_TEST_SUITE(FakeQuantWeights, FloatingTypes);

// More weights than one launch takes, of rows shorter and longer than what a block loads at once, some that do not
// begin at a vector.
TYPED_TEST(FakeQuantWeights, EqualsPlainLoops) {
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

TYPED_TEST(FakeQuantWeights, LaunchesOnceForTheWeightsOfAResNet50) {
  auto weights = random_weights<TypeParam>(54);
  EXPECT_EQ(quantize(weights, 7, 0), 1);
}

TYPED_TEST(FakeQuantWeights, NanHasNoSayInTheScale) {
  std::vector<Weight<TypeParam>> weights{
      {{TypeParam(NAN), TypeParam(-14), TypeParam(5)}, std::vector<TypeParam>(3), std::vector<Math<TypeParam>>(1), 3}};
  quantize(weights, 7, 0);
  EXPECT_EQ(weights[0].scales[0], 2);
  EXPECT_TRUE(std::isnan(static_cast<double>(weights[0].to[0])));
  EXPECT_EQ(static_cast<double>(weights[0].to[2]), 4);  // 2.5 steps: to the even one
}

}  // namespace
}  // namespace cctorch::device
