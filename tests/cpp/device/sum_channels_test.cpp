#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <random>

#include "tests/cpp/device/floats.h"
#include "tests/cpp/device/launch.h"
#include "tests/cpp/device/parameters.h"

#include "csrc/ops/formula/channel_gate.h"
#include "csrc/ops/formula/fake_quant.h"
#include "csrc/ops/formula/soft_threshold.h"
#include "kernels/sum_channels.cuh"

namespace cctorch::device {
namespace {

using channelwise::Layout;

constexpr double kQmin = -4;
constexpr double kQmax = 3;
constexpr double kFactor = 0.25;

template <typename S, typename P>
struct Backward {
  std::vector<S> grad_x;
  std::vector<P> sums;
};

// The numbers of a parameter.
std::array<double, 1> numbers(double value) { return {value}; }
template <typename T>
std::array<double, 2> numbers(const formula::Pair<T>& pair) {
  return {static_cast<double>(pair.first), static_cast<double>(pair.second)};
}

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <typename P>
P unwritten() {
  if constexpr (formula::is_pair<P>) {
    return formula::Narrow<P>::from({kNan, kNan});
  } else {
    return static_cast<P>(kNan);
  }
}

// Where the tensors begin, in elements after an address that vectors may have.
struct Offsets {
  int64_t grad_x = 0, grad = 0, x = 0;
};

template <typename S>
std::vector<S> moved(const std::vector<S>& values, int64_t offset) {
  std::vector<S> result(offset + values.size());
  std::copy(values.begin(), values.end(), result.begin() + offset);
  return result;
}

template <template <typename> typename Source, typename S, typename Formula,
          typename P = typename Formula::parameter_type>
Backward<S, P> run(const Formula& formula, const Layout& l, const std::vector<S>& grad, const std::vector<S>& x,
                   const std::vector<P>& parameters, int64_t blocks, uint32_t seed, const Offsets& offsets = {}) {
  const auto numel = static_cast<int64_t>(x.size());
  const auto grad_there = moved(grad, offsets.grad), x_there = moved(x, offsets.x);
  std::vector<S> grad_x(offsets.grad_x + numel, unwritten<S>());
  Sums<Formula> sums(l.channels);
  const auto part = cuda::sum_channels::partition<S>(l, blocks);
  std::vector<P> partials(part.numel(), unwritten<P>());
  const Parameters<Formula> numbers(parameters);
  const cuda::sum_channels::Work<S, Formula, Source<Formula>> work{{formula,
                                                                    {numbers.given()},
                                                                    l,
                                                                    grad_x.data() + offsets.grad_x,
                                                                    grad_there.data() + offsets.grad,
                                                                    x_there.data() + offsets.x,
                                                                    numel},
                                                                   part,
                                                                   partials.data(),
                                                                   kFactor,
                                                                   sums.totals()};
  cuda::sum_channels::backward(Launch{seed}, work);
  grad_x.erase(grad_x.begin(), grad_x.begin() + offsets.grad_x);
  return {grad_x, sums.of_channels()};
}

// gradient(grad, x, parameter) in float64 returns {of x, contribution to the parameter's}.
template <typename S, typename P, typename Gradient>
void expect_gradients(const Backward<S, P>& result, const Layout& l, const std::vector<S>& grad,
                      const std::vector<S>& x, const std::vector<P>& parameters, const Gradient& gradient) {
  using Numbers = decltype(numbers(formula::wide(P{})));
  std::vector<Numbers> sums(l.channels), sizes(l.channels);
  const double storage_step = std::numeric_limits<S>::epsilon();
  const double smallest = std::numeric_limits<S>::denorm_min();
  const double step = std::numeric_limits<Math<S>>::epsilon();
  for (size_t i = 0; i < x.size(); ++i) {
    const int64_t channel = static_cast<int64_t>(i) / l.inner % l.channels;
    const auto [of_x, contribution] =
        gradient(static_cast<double>(grad[i]), static_cast<double>(x[i]), formula::wide(parameters[channel]));
    ASSERT_NEAR(static_cast<double>(result.grad_x[i]), of_x, storage_step * std::abs(of_x) + smallest)
        << "element " << i;
    for (size_t k = 0; k < sums[channel].size(); ++k) {
      sums[channel][k] += numbers(contribution)[k];
      sizes[channel][k] += std::abs(numbers(contribution)[k]);
    }
  }
  // Each rounding is at most `step` of a partial sum; a thread, a warp and a block add fewer than 100 times in a row
  // here.
  for (int64_t c = 0; c < l.channels; ++c) {
    for (size_t k = 0; k < sums[c].size(); ++k) {
      EXPECT_NEAR(numbers(result.sums[c])[k], kFactor * sums[c][k], 100 * step * kFactor * sizes[c][k])
          << "channel " << c << ", parameter " << k;
    }
  }
}

// Rows shorter and longer than a vector, a warp's vectors, a segment and a block, and whole numbers of them; channels
// that fill a tile of columns, that do not, and that take several.
const Layout kLayouts[] = {{1, 1, 1},    {1, 1, 5000}, {3, 5, 49}, {2, 2, 2049}, {2, 3, 4096},  {37, 4, 32},
                           {1, 300, 33}, {40, 2, 300}, {70, 3, 1}, {9, 40, 1},   {100, 64, 1},  {40, 9, 49},
                           {33, 700, 1}, {17, 5, 9},   {1, 7, 9},  {5, 1, 31},   {1, 17, 2048}, {1, 16, 64}};

template <typename S>
class SumChannels : public ::testing::Test {};
TYPED_TEST_SUITE(SumChannels, FloatingTypes);

TYPED_TEST(SumChannels, ChannelGateEqualsFloat64) {
  using S = TypeParam;
  using T = Math<S>;
  for (const Layout& l : kLayouts) {
    const int64_t numel = l.outer * l.channels * l.inner;
    const auto grad = normal<S>(numel, 1), x = normal<S>(numel, 2);
    const auto gates = normal<T>(l.channels, 3);
    for (const int64_t blocks : {1, 12}) {
      SCOPED_TRACE(::testing::Message() << l.outer << " x " << l.channels << " x " << l.inner << ", " << blocks);
      const auto result = run<cuda::Given>(formula::ChannelGate<T>{}, l, grad, x, gates, blocks, 2);
      expect_gradients(result, l, grad, x, gates,
                       [](double g, double x, double gate) { return std::pair(g * gate, g * x); });
    }
  }
}

// Parts of tensors: nothing may be taken for a vector that is not at its address.
TYPED_TEST(SumChannels, WhereTensorsBeginMakesNoDifference) {
  using S = TypeParam;
  using T = Math<S>;
  for (const Layout& l :
       {Layout{1, 1, 5000}, Layout{2, 2, 2049}, Layout{3, 5, 49}, Layout{100, 64, 1}, Layout{1, 9, 128}}) {
    const int64_t numel = l.outer * l.channels * l.inner;
    const auto grad = normal<S>(numel, 1), x = normal<S>(numel, 2);
    const auto gates = normal<T>(l.channels, 3);
    for (const Offsets& offsets : {Offsets{1, 1, 1}, Offsets{0, 0, 1}, Offsets{0, 1, 0}, Offsets{1, 0, 0}}) {
      SCOPED_TRACE(::testing::Message() << l.outer << " x " << l.channels << " x " << l.inner << ", " << offsets.grad_x
                                        << offsets.grad << offsets.x);
      const auto result = run<cuda::Given>(formula::ChannelGate<T>{}, l, grad, x, gates, 12, 2, offsets);
      expect_gradients(result, l, grad, x, gates,
                       [](double g, double x, double gate) { return std::pair(g * gate, g * x); });
    }
  }
}

// What the blocks find is small beside the tensor, unless that is small itself.
TEST(SumChannelsPartition, LeavesFewPartials) {
  for (const Layout& l : {Layout{256, 64, 3136}, Layout{256, 2048, 49}, Layout{802816, 64, 1}, Layout{12544, 2048, 1},
                          Layout{1, 512, 64}, Layout{1, 512, 4608}, Layout{1, 1, 1 << 28}, Layout{1, 1 << 16, 128}}) {
    EXPECT_LE(16 * cuda::sum_channels::partition<float>(l, 1056).numel(), l.outer * l.channels * l.inner);
  }
}

TYPED_TEST(SumChannels, FakeQuantEqualsFloat64) {
  using S = TypeParam;
  using T = Math<S>;
  for (const Layout& l : {Layout{3, 5, 49}, Layout{9, 40, 1}}) {
    const int64_t numel = l.outer * l.channels * l.inner;
    const auto grad = normal<S>(numel, 1);
    // Off the halves between two levels and off the ends of the grid, so that rounding cannot decide differently.
    std::vector<S> x(numel);
    std::mt19937 random(2);
    for (S& value : x) value = static_cast<S>((static_cast<double>(random() % 14) - 7 + 0.25) * 0.5);
    const std::vector<T> log_scales(l.channels, static_cast<T>(std::log(0.5)));
    const formula::FakeQuant<T> lsq{static_cast<T>(kQmin), static_cast<T>(kQmax)};
    const auto result = run<cuda::Raw>(lsq, l, grad, x, log_scales, 12, 2);
    expect_gradients(result, l, grad, x, log_scales, [](double g, double x, double log_scale) {
      const double s = std::exp(log_scale), v = x / s;
      if (v < kQmin) return std::pair(0.0, g * s * kQmin);
      if (v > kQmax) return std::pair(0.0, g * s * kQmax);
      return std::pair(g, g * s * (std::round(v) - v));
    });
  }
}

TYPED_TEST(SumChannels, SoftThresholdEqualsFloat64) {
  using S = TypeParam;
  using T = Math<S>;
  for (const Layout& l : kLayouts) {
    const int64_t numel = l.outer * l.channels * l.inner;
    const auto grad = normal<S>(numel, 1);
    auto x = normal<S>(numel, 2);
    x[0] = S(0);
    std::vector<T> thresholds = normal<T>(l.channels, 3);
    for (T& threshold : thresholds) threshold = std::abs(threshold);
    const auto result = run<cuda::Raw>(formula::SoftThreshold<T>{}, l, grad, x, thresholds, 12, 2);
    expect_gradients(result, l, grad, x, thresholds, [](double g, double x, double threshold) {
      if (std::abs(x) <= threshold) return std::pair(0.0, 0.0);
      return std::pair(g, x > 0 ? -g : g);
    });
  }
}

TYPED_TEST(SumChannels, FakeQuantOffsetEqualsFloat64) {
  using S = TypeParam;
  using T = Math<S>;
  for (const Layout& l :
       {Layout{1, 1, 5000}, Layout{3, 5, 49}, Layout{9, 40, 1}, Layout{17, 5, 9}, Layout{1, 9, 300}}) {
    const int64_t numel = l.outer * l.channels * l.inner;
    const auto grad = normal<S>(numel, 1);
    // Quarter steps from the offset, off the halves and the ends.
    std::vector<S> x(numel);
    std::mt19937 random(2);
    for (S& value : x) value = static_cast<S>((static_cast<double>(random() % 14) - 7 + 0.25) * 0.5 + 0.25);
    const std::vector<formula::Pair<T>> raw(l.channels, {static_cast<T>(std::log(0.5)), T(0.25)});
    const formula::FakeQuantOffset<T> formula{{static_cast<T>(kQmin), static_cast<T>(kQmax)}};
    for (const int64_t blocks : {1, 12}) {
      SCOPED_TRACE(::testing::Message() << l.outer << " x " << l.channels << " x " << l.inner << ", " << blocks);
      const auto result = run<cuda::Raw>(formula, l, grad, x, raw, blocks, 2);
      expect_gradients(result, l, grad, x, raw, [](double g, double x, const formula::Pair<double>& p) {
        const double s = std::exp(p.first), v = (x - p.second) / s;
        if (v < kQmin) return std::pair(0.0, formula::Pair<double>{g * s * kQmin, g});
        if (v > kQmax) return std::pair(0.0, formula::Pair<double>{g * s * kQmax, g});
        return std::pair(g, formula::Pair<double>{g * s * (std::round(v) - v), 0.0});
      });
    }
  }
}

TEST(SumChannelsOrder, DoesNotDependOnTheSchedule) {
  for (const Layout& l : {Layout{3, 5, 49}, Layout{100, 64, 1}}) {
    const int64_t numel = l.outer * l.channels * l.inner;
    const auto grad = normal<float>(numel, 1), x = normal<float>(numel, 2), gates = normal<float>(l.channels, 3);
    const auto expected = run<cuda::Given>(formula::ChannelGate<float>{}, l, grad, x, gates, 12, 0).sums;
    for (const uint32_t seed : {1, 2, 3}) {
      EXPECT_EQ(run<cuda::Given>(formula::ChannelGate<float>{}, l, grad, x, gates, 12, seed).sums, expected)
          << "seed " << seed;
    }
  }
}

}  // namespace
}  // namespace cctorch::device
