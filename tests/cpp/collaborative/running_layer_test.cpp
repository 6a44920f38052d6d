#include "csrc/collaborative/running_layer.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <tuple>
#include <vector>

namespace cctorch::collaborative {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

Options wide() {
  Options options;
  options.effort = 1.0;  // every layer costs more
  return options;
}

at::Tensor normal(at::IntArrayRef shape, uint64_t seed) {
  return at::randn(shape, at::make_generator<at::CPUGeneratorImpl>(seed), at::TensorOptions(at::kDouble));
}

// Rebuilds the weight after every removal, in float64, with nothing but these directions for singular values.
struct BruteForce {
  at::Tensor weight, gradient, running, directions;  // N x Ck thrice, N x r
  int64_t kernel;
  std::set<int64_t> kept;

  BruteForce(const at::Tensor& w, const at::Tensor& g)
      : weight(w.flatten(1)), gradient(g.flatten(1)), running(weight), kernel(weight.size(1) / w.size(1)) {
    for (int64_t c = 0; c < w.size(1); ++c) kept.insert(c);
    renew(std::min(weight.size(0), weight.size(1)));
  }

  void renew(int64_t rank) { directions = std::get<0>(at::linalg_svd(running, false)).narrow(1, 0, rank); }

  at::Tensor without_channel(const at::Tensor& x, int64_t channel) const {
    at::Tensor y = x.clone();
    y.narrow(1, channel * kernel, kernel).zero_();
    return y;
  }
  at::Tensor part(const at::Tensor& x, int64_t value) const {
    const at::Tensor u = directions.narrow(1, value, 1);
    return u.mm(u.t().mm(x));
  }
  double loss(const at::Tensor& x) const { return (gradient * (x - weight)).square().sum().item<double>(); }

  void remove_channel(int64_t channel) {
    running = without_channel(running, channel);
    kept.erase(channel);
  }
  void remove_value(int64_t value) {
    running = running - part(running, value);
    directions = at::cat({directions.narrow(1, 0, value), directions.narrow(1, value + 1, -value - 1 + rank())}, 1);
  }
  int64_t rank() const { return directions.size(1); }

  // Mean loss of all that may go next.
  double expected(const at::Tensor& x, int64_t without_channel_number, int64_t without_value) const {
    double sum = 0, count = 0;
    for (const int64_t c : kept) {
      if (c == without_channel_number) continue;
      sum += loss(without_channel(x, c)), ++count;
    }
    for (int64_t i = 0; i < rank(); ++i) {
      if (i == without_value) continue;
      sum += loss(x - part(x, i)), ++count;
    }
    return sum / count;
  }

  std::vector<double> scores(int64_t channels, double gamma) const {
    std::vector<double> all(channels, infinity);
    for (const int64_t c : kept) {
      const at::Tensor x = without_channel(running, c);
      all[c] = loss(x) + gamma * expected(x, c, -1);
    }
    const auto others = static_cast<double>(kept.size()) + static_cast<double>(rank()) - 1;
    for (int64_t i = 0; i < rank(); ++i) {
      const at::Tensor gone = part(running, i), x = running - gone;
      const double with_all = (gradient.square() * gone * running).sum().item<double>();
      const double with_itself = (gradient * gone).square().sum().item<double>();
      // What is documented: one for the other, in the look-ahead.
      const double estimate = 2 * gamma / others * (with_itself - with_all);
      all.push_back(loss(x) + gamma * expected(x, -1, i) + estimate);
    }
    return all;
  }
};

void expect_near(const std::vector<double>& got, const std::vector<double>& expected) {
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::isinf(expected[i])) {
      EXPECT_EQ(got[i], expected[i]) << i;
    } else {
      EXPECT_NEAR(got[i], expected[i], 1e-5 * std::abs(expected[i])) << i;
    }
  }
}

class WideLayer : public testing::TestWithParam<std::vector<int64_t>> {
 protected:
  const at::Tensor weight = normal(GetParam(), 1), gradient = normal(GetParam(), 2);
  RunningLayer layer{weight, gradient, wide()};
  BruteForce brute{weight, gradient};
};

INSTANTIATE_TEST_SUITE_P(Shapes, WideLayer,
                         testing::Values(std::vector<int64_t>{12, 10}, std::vector<int64_t>{6, 20},
                                         std::vector<int64_t>{30, 8}, std::vector<int64_t>{10, 8, 3, 3},
                                         std::vector<int64_t>{40, 9, 1, 3}));

TEST_P(WideLayer, ScoresThroughoutARemovalAreThoseOfAWeightRebuiltFromTheSameDirections) {
  const auto agree = [&] { expect_near(layer.scores(wide()), brute.scores(weight.size(1), wide().gamma)); };
  const auto remove_channels = [&](const std::vector<int64_t>& channels) {
    layer.remove_channels(channels);
    for (const int64_t c : channels) brute.remove_channel(c);
    agree();
  };
  // As many values as the channels to go would take with them, and not the smallest.
  const auto remove_values = [&](int64_t channels) {
    std::vector<int64_t> values(std::min(channels * brute.kernel, brute.rank() / 2));
    std::iota(values.begin(), values.end(), 1);
    layer.remove_values(values);
    for (size_t i = 0; i < values.size(); ++i) brute.remove_value(1);
    agree();
  };
  agree();
  remove_values(2);
  remove_channels({4, 1});
  remove_values(1);
  remove_channels({0});
  EXPECT_NEAR(layer.loss(), brute.loss(brute.running), 1e-5 * layer.loss());
}

TEST_P(WideLayer, LossesOfEachUnitAlone) {
  std::vector<double> expected;
  for (const int64_t c : brute.kept) expected.push_back(brute.loss(brute.without_channel(weight.flatten(1), c)));
  for (int64_t i = 0; i < brute.rank(); ++i)
    expected.push_back(brute.loss(weight.flatten(1) - brute.part(weight.flatten(1), i)));
  expect_near(layer.losses_alone(true), expected);
}

TEST_P(WideLayer, ScoresOfChannelsAloneLeaveOutWhatSingularValuesWouldDoNext) {
  Options options = wide();
  options.units = Units::channels;
  layer.remove_channels({1});
  brute.remove_channel(1);
  const std::vector<double> scores = layer.scores(options);
  for (const int64_t c : brute.kept) {
    const at::Tensor x = brute.without_channel(brute.running, c);
    const double others = static_cast<double>(brute.kept.size()) + static_cast<double>(layer.rank()) - 1;
    // 4 sum G∘(X - W)∘(-X) + sum G∘X² of (E4); X - W is zero where X is not.
    const double next = (brute.gradient * x).square().sum().item<double>();
    const double expected = (1 + options.gamma) * brute.loss(x) + options.gamma / others * next;
    EXPECT_NEAR(scores[c], expected, 1e-5 * expected);
  }
}

// Above 2048, eigenproblems are solved in float32: half of the values go, and the rest is the best approximation.
TEST(RunningLayer, AVeryWideOneIsTruncatedAsInFloat64) {
  const int64_t size = 2080, rank = 1040;
  const at::Tensor weight = normal({size, size}, 1), gradient = normal({size, size}, 2);
  RunningLayer layer(weight, gradient, Options{});
  std::vector<int64_t> smallest(size - rank);
  std::iota(smallest.begin(), smallest.end(), rank);
  layer.remove_values(smallest);
  const at::Tensor vectors = std::get<1>(at::linalg_eigh(weight.mm(weight.t())));
  const at::Tensor u = vectors.narrow(1, size - rank, rank);
  const double loss = (gradient * (u.mm(u.t().mm(weight)) - weight)).square().sum().item<double>();
  EXPECT_NEAR(layer.loss(), loss, 1e-4 * loss);
}

TEST(RunningLayer, AWideOneTakesItsSingularVectorsAnewOnceHalfOfTheSquaresHasGone) {
  at::Tensor weight = normal({8, 12}, 1), gradient = normal({8, 12}, 2);
  weight.select(1, 3).mul_(1e3);
  gradient.select(1, 3).mul_(1e-6);
  BruteForce brute(weight, gradient);
  RunningLayer layer(weight, gradient, wide());
  layer.losses_alone(true);  // decomposes it
  layer.remove_channels({3});
  brute.remove_channel(3);
  brute.renew(8);
  layer.remove_values({7, 6, 5});
  for (const int64_t value : {7, 6, 5}) brute.remove_value(value);
  // What is left is the best approximation of rank 5.
  const auto [u, s, vh] = at::linalg_svd(brute.weight.index_fill(1, at::tensor({3}, at::kLong), 0), false);
  const at::Tensor best = u.narrow(1, 0, 5).mul(s.narrow(0, 0, 5)).mm(vh.narrow(0, 0, 5));
  EXPECT_NEAR(brute.loss(brute.running), brute.loss(best), 1e-9 * layer.loss());
  EXPECT_NEAR(layer.loss(), brute.loss(best), 1e-4 * layer.loss());
}

TEST(RunningLayer, AWideOneTakesItsSingularVectorsAnewWhenItHasFewerInputsThanDirections) {
  const at::Tensor weight = normal({12, 12}, 1), gradient = normal({12, 12}, 2);
  BruteForce brute(weight, gradient);
  RunningLayer layer(weight, gradient, wide());
  layer.losses_alone(true);  // decomposes it
  layer.remove_channels({0, 1});
  for (const int64_t c : {0, 1}) brute.remove_channel(c);
  EXPECT_EQ(layer.rank(), 10);
  brute.renew(10);
  layer.remove_values({9});
  brute.remove_value(9);
  EXPECT_NEAR(layer.loss(), brute.loss(brute.running), 1e-5 * layer.loss());
}

TEST(RunningLayer, ACopyGoesItsOwnWay) {
  const at::Tensor weight = normal({12, 10}, 1), gradient = normal({12, 10}, 2);
  RunningLayer layer(weight, gradient, wide());
  const std::vector<double> before = layer.scores(wide());
  RunningLayer copy = layer;
  copy.remove_values({7, 8});
  copy.remove_channels({0, 5});
  EXPECT_EQ(layer.scores(wide()), before);
  EXPECT_EQ(layer.loss(), 0.0);
}

TEST(RankingShare, FollowsFromTheCostAndEndsAtAnEighth) {
  Options options;
  options.effort = 1e9;
  EXPECT_EQ(ranking_share(0.9e7, options), 0.0);
  EXPECT_DOUBLE_EQ(ranking_share(2e7, options), 0.02);
  EXPECT_DOUBLE_EQ(ranking_share(1e12, options), 0.125);
  options.basis = Basis::exact;
  EXPECT_EQ(ranking_share(1e12, options), 0.0);
  options = Options{};
  options.effort = infinity;
  EXPECT_EQ(ranking_share(1e20, options), 0.0);
  // As it is by default, layers as large as those of the CIFAR ResNets are not wide.
  EXPECT_EQ(ranking_share(ranking_macs(64 * 9, 64, 64), Options{}), 0.0);
  EXPECT_EQ(ranking_share(ranking_macs(25088, 4096, 4096), Options{}), 0.125);
}

}  // namespace
}  // namespace cctorch::collaborative
