#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "tests/cpp/device/floats.h"
#include "tests/cpp/device/launch.h"

#include "kernels/codebook.cuh"
#include "kernels/list.cuh"

namespace cctorch::device {
namespace {

template <typename S>
struct Tensor {
  std::vector<S> x;  // behind `skipped` elements
  std::vector<S> values;
  std::vector<Math<S>> codebook;
  int64_t skipped, span;

  int64_t size() const { return static_cast<int64_t>(x.size()) - skipped; }
  int64_t parts() const { return ceil_div(size(), span); }
  cuda::codebook::Part<S, Math<S>> part() const {
    return {x.data() + skipped, codebook.data(), size(), span, static_cast<int>(codebook.size())};
  }
};

// Of several blocks and of a part of one, that begin at a vector or not, with codebooks shorter and longer than the
// cells that are added up at once.
template <typename S>
std::vector<Tensor<S>> random_tensors(bool with_equal_values) {
  std::vector<Tensor<S>> tensors;
  unsigned seed = 1;
  for (const auto& [size, count, skipped] :
       {std::tuple{5000, 16, 0}, {1, 1, 0}, {300, 2, 1}, {2049, 17, 3}, {700, 256, 0}, {4096, 40, 1}}) {
    Tensor<S> tensor{normal<S>(size + skipped, seed), normal<S>(size, seed + 1), {}, skipped, 1024};
    for (const float value : normal<float>(count, seed + 2)) tensor.codebook.push_back(static_cast<Math<S>>(value));
    if (with_equal_values && count > 2) tensor.codebook[count / 2] = tensor.codebook[0];
    tensors.push_back(std::move(tensor));
    seed += 3;
  }
  return tensors;
}

// The lower of two values as near, the first of equal ones; a NaN's distance is the smallest, as for argmin.
template <typename S>
size_t nearest(const Tensor<S>& tensor, int64_t i) {
  const auto x = static_cast<long double>(tensor.x[tensor.skipped + i]);
  const auto& book = tensor.codebook;
  for (size_t k = 0; k < book.size(); ++k) {
    if (std::isnan(book[k])) return k;
  }
  size_t best = 0;
  for (size_t k = 1; k < book.size(); ++k) {
    const long double its = std::abs(x - book[k]), least = std::abs(x - book[best]);
    if (its < least || (its == least && book[k] < book[best])) best = k;
  }
  return best;
}

template <typename S>
std::vector<std::vector<S>> quantized(const std::vector<Tensor<S>>& tensors, uint32_t seed, int* launches = nullptr) {
  std::vector<std::vector<S>> results;
  std::vector<cuda::codebook::Quantize<S, Math<S>>> bodies;
  for (const auto& tensor : tensors) results.emplace_back(tensor.size(), S(-99));
  for (size_t i = 0; i < tensors.size(); ++i) bodies.push_back({tensors[i].part(), results[i].data()});
  cuda::launch_together(Launch{seed, launches}, bodies);
  return results;
}

template <typename S>
std::vector<std::vector<Math<S>>> totals(const std::vector<Tensor<S>>& tensors, uint32_t seed, bool mean,
                                         int* launches = nullptr) {
  std::vector<std::vector<Math<S>>> results;
  std::vector<std::vector<double>> sums;
  std::vector<std::vector<unsigned>> counts;
  for (const auto& tensor : tensors) {
    results.emplace_back(tensor.codebook.size(), Math<S>(-99));
    sums.emplace_back(tensor.parts() * tensor.codebook.size(), -99.0);
    counts.emplace_back(tensor.parts() * tensor.codebook.size(), 99u);
  }
  std::vector<cuda::codebook::Sums<S, Math<S>>> bodies;
  std::vector<cuda::codebook::Total<Math<S>>> last;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto part = tensors[i].part();
    if (part.size > 0) {
      bodies.push_back({part, tensors[i].values.data(), sums[i].data(), counts[i].data()});
    }
    last.push_back(
        {part.codebook, results[i].data(), sums[i].data(), counts[i].data(), part.blocks(), part.count, mean});
  }
  cuda::launch_together(Launch{seed, launches}, bodies);
  cuda::launch_together(Launch{seed, launches}, last);
  return results;
}

template <typename S>
class Codebook : public ::testing::Test {};
TYPED_TEST_SUITE(Codebook, FloatingTypes);

TYPED_TEST(Codebook, EachValueBecomesTheNearest) {
  const auto tensors = random_tensors<TypeParam>(true);
  for (const uint32_t seed : {0u, 1u, 7u}) {
    const auto results = quantized(tensors, seed);
    for (size_t t = 0; t < tensors.size(); ++t) {
      std::vector<int64_t> places(tensors[t].size(), -1);
      cuda::launch_together(Launch{seed}, std::vector<cuda::codebook::Indices<TypeParam, Math<TypeParam>>>{
                                              {tensors[t].part(), places.data()}});
      for (int64_t i = 0; i < tensors[t].size(); ++i) {
        const auto& book = tensors[t].codebook;
        const size_t expected = nearest(tensors[t], i);
        ASSERT_EQ(book[places[i]], book[expected]) << "tensor " << t << ", element " << i;
        ASSERT_EQ(results[t][i], static_cast<TypeParam>(book[expected]));
      }
    }
  }
}

TYPED_TEST(Codebook, WhatIsHalfwayGoesToTheLower) {
  std::vector<Tensor<TypeParam>> tensors{{{}, {}, {3, -1, 0.5, 2}, 0, 1024}};
  for (const double x : {-0.25, 1.25, 2.5, 2.25, -7.0, 9.0}) tensors[0].x.push_back(static_cast<TypeParam>(x));
  const auto results = quantized(tensors, 0);
  std::vector<double> found;
  for (const TypeParam y : results[0]) found.push_back(static_cast<double>(y));
  EXPECT_EQ(found, (std::vector<double>{-1, 0.5, 2, 2, -1, 3}));
}

TYPED_TEST(Codebook, MembersAreAddedUp) {
  const auto tensors = random_tensors<TypeParam>(false);
  const double rounding = std::numeric_limits<Math<TypeParam>>::epsilon();
  for (const bool mean : {false, true}) {
    const auto results = totals(tensors, 7, mean);
    EXPECT_EQ(results, totals(tensors, 0, mean));
    EXPECT_EQ(results, totals(tensors, 1, mean));
    for (size_t t = 0; t < tensors.size(); ++t) {
      const auto& [x, values, book, skipped, span] = tensors[t];
      std::vector<long double> sums(book.size()), sizes(book.size()), count(book.size());
      for (int64_t i = 0; i < tensors[t].size(); ++i) {
        const auto value = static_cast<long double>(values[i]);
        const size_t place = nearest(tensors[t], i);
        sums[place] += value;
        sizes[place] += std::abs(value);
        ++count[place];
      }
      for (size_t k = 0; k < book.size(); ++k) {
        const auto expected = !mean ? sums[k] : (count[k] > 0 ? sums[k] / count[k] : book[k]);
        const auto size = !mean ? sizes[k] : (count[k] > 0 ? sizes[k] / count[k] : std::abs(book[k]));
        EXPECT_NEAR(static_cast<double>(results[t][k]), static_cast<double>(expected),
                    2 * rounding * static_cast<double>(size))
            << "tensor " << t << ", value " << k;
      }
    }
  }
}

TYPED_TEST(Codebook, NanIsTheNearestOfAllAndStaysInX) {
  const Math<TypeParam> nan = NAN;
  std::vector<Tensor<TypeParam>> tensors{
      {{TypeParam(1), TypeParam(NAN), TypeParam(3)}, {TypeParam(1), TypeParam(2), TypeParam(4)}, {5, nan, 1}, 0, 1024},
      {{TypeParam(1), TypeParam(NAN)}, {TypeParam(1), TypeParam(2)}, {5, 1}, 0, 1024}};
  const auto results = quantized(tensors, 0);
  for (const TypeParam y : results[0]) EXPECT_TRUE(std::isnan(static_cast<double>(y)));
  EXPECT_EQ(static_cast<double>(results[1][0]), 1);
  EXPECT_TRUE(std::isnan(static_cast<double>(results[1][1])));
  const auto sums = totals(tensors, 0, false);
  EXPECT_EQ(sums[0], (std::vector<Math<TypeParam>>{0, 7, 0}));
}

TYPED_TEST(Codebook, AValueOfNoMembersStays) {
  std::vector<Tensor<TypeParam>> tensors{{{}, {}, {2, 7}, 0, 1024}, {{TypeParam(1)}, {TypeParam(1)}, {90, 3}, 0, 1024}};
  const auto means = totals(tensors, 0, true);
  EXPECT_EQ(means[0], (std::vector<Math<TypeParam>>{2, 7}));
  EXPECT_EQ(means[1], (std::vector<Math<TypeParam>>{90, 1}));
  EXPECT_EQ(totals(tensors, 0, false)[0], (std::vector<Math<TypeParam>>{0, 0}));
}

TYPED_TEST(Codebook, LaunchesOnceOrTwiceForTheWeightsOfAResNet50) {
  const std::vector<Tensor<TypeParam>> tensors(54, random_tensors<TypeParam>(false)[2]);
  int launches = 0;
  quantized(tensors, 0, &launches);
  EXPECT_EQ(launches, 1);
  totals(tensors, 0, true, &launches);
  EXPECT_EQ(launches, 3);
}

}  // namespace
}  // namespace cctorch::device
