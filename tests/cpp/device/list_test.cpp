#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "tests/cpp/device/floats.h"
#include "tests/cpp/device/launch.h"
#include "tests/cpp/device/parameters.h"

#include "csrc/ops/formula/fake_quant.h"
#include "kernels/elementwise.cuh"
#include "kernels/sum_channels.cuh"

namespace cctorch::device {
namespace {

using channelwise::Layout;

constexpr double kQmin = -4;
constexpr double kQmax = 3;

// A tensor of a list on a grid around an offset, and what is made of it. `skipped` elements come before each array: not
// all tensors begin at a vector.
template <typename S>
struct Tensor {
  using T = Math<S>;
  using Formula = formula::FakeQuantOffset<T>;

  Layout layout;
  int64_t skipped;
  std::vector<S> x, grad, y, grad_x;
  std::vector<formula::Pair<T>> raw;
  Parameters<Formula> parameters;
  Sums<Formula> sums;
  std::vector<formula::Pair<T>> partials;
  double factor;

  Tensor(const Layout& l, int64_t skipped, double factor, unsigned seed)
      : layout(l),
        skipped(skipped),
        x(skipped + numel()),
        grad(x.size()),
        y(x.size(), static_cast<S>(NAN)),
        grad_x(y),
        raw(channels_of(l)),
        parameters(raw),
        sums(l.channels),
        factor(factor) {
    std::mt19937 random(seed);
    // Quarter steps from the offset, off the halves and the ends of the grid: rounding cannot decide differently.
    for (S& value : x) value = static_cast<S>((static_cast<double>(random() % 14) - 7 + 0.25) * 0.5 + 0.25);
    for (S& value : grad) value = static_cast<S>(static_cast<double>(random() % 9) - 4);
  }

  static std::vector<formula::Pair<T>> channels_of(const Layout& l) {
    std::vector<formula::Pair<T>> raw;
    for (int64_t c = 0; c < l.channels; ++c)
      raw.push_back({static_cast<T>(std::log(0.5)), T(c % 2 == 0 ? 0.25 : 1.25)});
    return raw;
  }

  int64_t numel() const { return layout.outer * layout.channels * layout.inner; }
  cuda::Raw<Formula> source() const { return {parameters.given()}; }
  auto forward(const Formula& formula) {
    return cuda::elementwise::kernel(formula, source(), layout, y.data() + skipped, x.data() + skipped, numel());
  }
  cuda::sum_channels::Work<S, Formula, cuda::Raw<Formula>> backward(const Formula& formula, int64_t blocks) {
    const auto part = cuda::sum_channels::partition<S>(layout, blocks);
    partials.assign(part.numel(), {T(NAN), T(NAN)});
    return {{formula, source(), layout, grad_x.data() + skipped, grad.data() + skipped, x.data() + skipped, numel()},
            part,
            partials.data(),
            factor,
            sums.totals()};
  }

  // In float64, element by element.
  void expect_all() const {
    std::vector<double> of_scale(layout.channels), of_offset(layout.channels);
    for (int64_t i = 0; i < numel(); ++i) {
      const int64_t c = i / layout.inner % layout.channels;
      const auto value = static_cast<double>(x[skipped + i]), g = static_cast<double>(grad[skipped + i]);
      const double offset = raw[c].second, v = (value - offset) / 0.5;
      const double q = std::round(std::min(kQmax, std::max(kQmin, v)));
      const bool inside = kQmin <= v && v <= kQmax;
      ASSERT_NEAR(static_cast<double>(y[skipped + i]), 0.5 * q + offset, 1e-6) << "element " << i;
      ASSERT_EQ(static_cast<double>(grad_x[skipped + i]), inside ? g : 0) << "element " << i;
      of_scale[c] += factor * g * 0.5 * (inside ? q - v : q);
      of_offset[c] += inside ? 0 : factor * g;
    }
    for (int64_t c = 0; c < layout.channels; ++c) {
      const double error = 1e-6 * static_cast<double>(numel());
      EXPECT_NEAR(static_cast<double>(sums.of_channels()[c].first), of_scale[c], error) << "channel " << c;
      EXPECT_NEAR(static_cast<double>(sums.of_channels()[c].second), of_offset[c], error) << "channel " << c;
    }
  }
};

template <typename S>
class ListOfTensors : public ::testing::Test {
 protected:
  using Formula = formula::FakeQuantOffset<Math<S>>;
  const Formula formula{{Math<S>(kQmin), Math<S>(kQmax)}};

  int forward(std::vector<Tensor<S>>& list, uint32_t seed) const {
    int launches = 0;
    std::vector<cuda::elementwise::ElementWise<S, Formula, cuda::Raw<Formula>>> kernels;
    for (auto& tensor : list) kernels.push_back(tensor.forward(formula));
    cuda::launch_together(Launch{seed, &launches}, kernels);
    return launches;
  }
  int backward(std::vector<Tensor<S>>& list, uint32_t seed) const {
    int launches = 0;
    std::vector<cuda::sum_channels::Work<S, Formula, cuda::Raw<Formula>>> works;
    for (auto& tensor : list) works.push_back(tensor.backward(formula, 4));
    cuda::sum_channels::backward(Launch{seed, &launches}, works);
    return launches;
  }
};
TYPED_TEST_SUITE(ListOfTensors, FloatingTypes);

// Rows that a warp takes, that several blocks take, and columns; tensors of a block and of several; some that begin in
// the middle of a vector; more of them than one launch has room for.
TYPED_TEST(ListOfTensors, EqualsFloat64) {
  const Layout layouts[] = {{1, 1, 1}, {1, 5, 49},   {1, 1, 9001}, {3, 5, 64},   {40, 7, 1},
                            {9, 3, 9}, {1, 3, 2049}, {1, 64, 9},   {2, 1, 2500}, {33, 17, 3}};
  for (const uint32_t seed : {0u, 1u, 5u}) {
    std::vector<Tensor<TypeParam>> list;
    for (int i = 0; i < 90; ++i) list.emplace_back(layouts[i % 10], i % 4 == 3 ? 1 : 0, 0.25 * (1 + i % 3), 7 + i);
    this->forward(list, seed);
    this->backward(list, seed);
    for (size_t i = 0; i < list.size(); ++i) {
      SCOPED_TRACE(::testing::Message() << "tensor " << i << ", seed " << seed);
      list[i].expect_all();
    }
  }
}

TYPED_TEST(ListOfTensors, TakesAFewLaunchesForTheWeightsOfAResNet50) {
  // One scale for each filter: rows of 64 to 4608 elements.
  std::vector<Tensor<TypeParam>> list;
  for (int i = 0; i < 54; ++i) list.emplace_back(Layout{1, 3, i % 3 == 2 ? 4608 : 64 * (1 + i % 3)}, 0, 1.0, i);
  EXPECT_LE(this->forward(list, 0), 2);
  EXPECT_LE(this->backward(list, 0), 4);
}

TYPED_TEST(ListOfTensors, NothingIsStartedForNothing) {
  std::vector<Tensor<TypeParam>> list;
  EXPECT_EQ(this->forward(list, 0), 0);
  EXPECT_EQ(this->backward(list, 0), 0);
}

}  // namespace
}  // namespace cctorch::device
