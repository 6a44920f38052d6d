#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/cpp/device/floats.h"
#include "tests/cpp/device/launch.h"
#include "tests/cpp/device/parameters.h"

#include "csrc/ops/formula/channel_gate.h"
#include "csrc/ops/formula/fake_quant.h"
#include "csrc/ops/formula/float_quant.h"
#include "csrc/ops/formula/soft_threshold.h"
#include "kernels/elementwise.cuh"

namespace cctorch::device {
namespace {

using channelwise::Layout;
using formula::Pair;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kGuard = 8;  // elements on each side that are not to be written

struct Offsets {
  int64_t y, x;
};

template <template <typename> typename Source, typename S, typename Formula,
          typename P = typename Formula::parameter_type>
std::vector<S> run(const Formula& formula, const Layout& l, const std::vector<S>& x, const std::vector<P>& parameters,
                   const Offsets& offsets) {
  const auto numel = static_cast<int64_t>(x.size());
  std::vector<S> from(offsets.x + numel), to(kGuard + offsets.y + numel + kGuard, static_cast<S>(kNan));
  std::copy(x.begin(), x.end(), from.begin() + offsets.x);
  const Parameters<Formula> numbers(parameters);
  const auto begin = to.begin() + kGuard + offsets.y;
  cuda::elementwise::forward(Launch{2}, formula, Source<Formula>{numbers.given()}, l, &*begin, from.data() + offsets.x,
                             numel);
  const auto untouched = [](S value) { return std::isnan(static_cast<double>(value)); };
  EXPECT_TRUE(std::all_of(to.begin(), begin, untouched));
  EXPECT_TRUE(std::all_of(begin + numel, to.end(), untouched));
  return {begin, begin + numel};
}

// One parameter for all; channels along rows of all lengths; channels next to each other that repeat with a thread's
// step, and that do not; groups; whole tiles and parts of them.
const Layout kLayouts[] = {{1, 1, 1},    {1, 1, 8192}, {1, 1, 20001}, {3, 5, 49},   {2, 2, 8193}, {1, 300, 64},
                           {1, 300, 33}, {300, 64, 1}, {700, 40, 1},  {6000, 3, 1}, {170, 5, 10}, {90, 4, 49}};

// value(a random number), parameter(channel), reference(x, parameter) in float64. With all layouts, and tensors that
// begin in the middle of a vector.
template <template <typename> typename Source, typename S, typename Formula, typename Value, typename Parameter,
          typename Reference>
void expect_everywhere(const Formula& formula, const Value& value, const Parameter& parameter,
                       const Reference& reference) {
  using P = typename Formula::parameter_type;
  for (const Layout& l : kLayouts) {
    std::vector<S> x(l.outer * l.channels * l.inner);
    std::mt19937 random(1);
    for (S& element : x) element = value(random());
    std::vector<P> parameters;
    for (int64_t c = 0; c < l.channels; ++c) parameters.push_back(parameter(c));
    for (const Offsets& offsets : {Offsets{0, 0}, Offsets{1, 1}, Offsets{0, 1}, Offsets{1, 0}}) {
      SCOPED_TRACE(::testing::Message() << l.outer << " x " << l.channels << " x " << l.inner << ", y from "
                                        << offsets.y << ", x from " << offsets.x);
      const auto y = run<Source>(formula, l, x, parameters, offsets);
      for (size_t i = 0; i < x.size(); ++i) {
        const int64_t channel = static_cast<int64_t>(i) / l.inner % l.channels;
        const double expected = reference(static_cast<double>(x[i]), formula::wide(parameters[channel]));
        const double error = 2 * static_cast<double>(std::numeric_limits<S>::epsilon()) * std::abs(expected);
        ASSERT_NEAR(static_cast<double>(y[i]), expected, error) << "element " << i;
      }
    }
  }
}

// Off the halves between two levels of step 1/2, 1/4 or 1/8, and off the ends of the grid: rounding cannot decide
// differently.
template <typename S>
S quarter_steps(unsigned random) {
  return static_cast<S>((static_cast<double>(random % 37) - 18) / 2 + 0.03125);
}

double log_scale(int64_t channel) { return std::log(0.5) * static_cast<double>(1 + channel % 3); }

double rounded(double x, double s, double qmin, double qmax) {
  return s * std::round(std::min(qmax, std::max(qmin, x / s)));
}

// The nearest of the values of an eight-bit float, all listed.
double nearest_fp8(double v, int exponents, int mantissas, double largest) {
  const int bias = (1 << (exponents - 1)) - 1;
  double best = 0;
  for (int e = 0; e < 1 << exponents; ++e) {
    for (int m = 0; m < 1 << mantissas; ++m) {
      const double fraction = static_cast<double>(m) / (1 << mantissas);
      const double value = e == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, e - bias);
      if (value <= largest && std::abs(std::abs(v) - value) < std::abs(std::abs(v) - best)) best = value;
    }
  }
  return std::copysign(best, v);
}

template <typename S>
class ElementWise : public ::testing::Test {};
TYPED_TEST_SUITE(ElementWise, FloatingTypes);

TYPED_TEST(ElementWise, FakeQuantEqualsFloat64) {
  using T = Math<TypeParam>;
  expect_everywhere<cuda::Raw, TypeParam>(
      formula::FakeQuant<T>{-4, 3}, quarter_steps<TypeParam>, [](int64_t c) { return static_cast<T>(log_scale(c)); },
      [](double x, double raw) { return rounded(x, std::exp(raw), -4, 3); });
}

TYPED_TEST(ElementWise, FakeQuantOffsetEqualsFloat64) {
  using T = Math<TypeParam>;
  expect_everywhere<cuda::Raw, TypeParam>(
      formula::FakeQuantOffset<T>{{-4, 3}}, quarter_steps<TypeParam>,
      [](int64_t c) {
        return Pair<T>{static_cast<T>(log_scale(c)), static_cast<T>(2.5 + 0.5 * static_cast<double>(c % 5))};
      },
      [](double x, const Pair<double>& raw) {
        return rounded(x - raw.second, std::exp(raw.first), -4, 3) + raw.second;
      });
}

TYPED_TEST(ElementWise, PactEqualsFloat64) {
  using T = Math<TypeParam>;
  expect_everywhere<cuda::Raw, TypeParam>(
      formula::Pact<T>{7}, quarter_steps<TypeParam>,
      [](int64_t c) { return static_cast<T>(log_scale(c) + std::log(7.0)); },
      [](double x, double raw) { return rounded(x, std::exp(raw) / 7, 0, 7); });
}

TYPED_TEST(ElementWise, Fp8EqualsTheNearestOfAllItsValues) {
  using T = Math<TypeParam>;
  const auto parameter = [](int64_t c) { return static_cast<T>(log_scale(c) - 3.01); };
  expect_everywhere<cuda::Raw, TypeParam>(
      formula::FloatQuant<T>{T(448), T(0x1p-6), T(0x1p-3)}, quarter_steps<TypeParam>, parameter,
      [](double x, double raw) { return std::exp(raw) * nearest_fp8(x / std::exp(raw), 4, 3, 448); });
  expect_everywhere<cuda::Raw, TypeParam>(
      formula::FloatQuant<T>{T(57344), T(0x1p-14), T(0x1p-2)}, quarter_steps<TypeParam>, parameter,
      [](double x, double raw) { return std::exp(raw) * nearest_fp8(x / std::exp(raw), 5, 2, 57344); });
}

TYPED_TEST(ElementWise, PowersOfTwoEqualTheNearestOfAllValues) {
  using T = Math<TypeParam>;
  expect_everywhere<cuda::Given, TypeParam>(
      formula::FloatQuant<T>{T(1), T(0.25), T(1)}, quarter_steps<TypeParam>,
      [](int64_t c) { return static_cast<T>(std::ldexp(1.0, static_cast<int>(c % 4))); },
      [](double x, double top) {
        double best = 0;
        for (const double value : {top / 4, top / 2, top}) {
          if (std::abs(std::abs(x) - value) < std::abs(std::abs(x) - best)) best = value;
        }
        return std::copysign(best, x);
      });
}

TYPED_TEST(ElementWise, SoftThresholdEqualsFloat64) {
  using T = Math<TypeParam>;
  expect_everywhere<cuda::Raw, TypeParam>(
      formula::SoftThreshold<T>{}, quarter_steps<TypeParam>,
      [](int64_t c) { return static_cast<T>(0.5 * static_cast<double>(c % 7)); },
      [](double x, double threshold) { return std::copysign(std::max(0.0, std::abs(x) - threshold), x); });
}

TYPED_TEST(ElementWise, ChannelGateEqualsFloat64) {
  using T = Math<TypeParam>;
  expect_everywhere<cuda::Given, TypeParam>(
      formula::ChannelGate<T>{}, quarter_steps<TypeParam>,
      [](int64_t c) { return static_cast<T>(1.5 - static_cast<double>(c % 11)); },
      [](double x, double gate) { return x * gate; });
}

TEST(ElementWiseLaunch, StartsNothingForNothing) {
  EXPECT_TRUE((run<cuda::Given, float>(formula::ChannelGate<float>{}, {1, 1, 0}, {}, {1.0f}, {0, 0}).empty()));
}

// Tensors of more than 2^31 elements: where its last elements are looked up without the memory.
TEST(ElementWisePosition, CountsIn64Bits) {
  const Layout l{1 << 20, 300, 49};
  const int64_t element = l.outer * l.channels * l.inner - 5;
  const auto position = cuda::Position::of(l, element);
  EXPECT_EQ(position.channel, 299);
  EXPECT_EQ(position.within, 44);
  cuda::Position moved = cuda::Position::of(l, element - (int64_t(1) << 33));
  moved.advance(l, cuda::Position::of(l, int64_t(1) << 33));
  EXPECT_EQ(moved.channel, position.channel);
  EXPECT_EQ(moved.within, position.within);
}

}  // namespace
}  // namespace cctorch::device
