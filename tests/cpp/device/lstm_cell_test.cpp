#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "tests/cpp/device/floats.h"
#include "tests/cpp/device/launch.h"

#include "kernels/lstm_cell.cuh"

namespace cctorch::device {
namespace {

constexpr int64_t kGuard = 8;  // elements on each side that are not to be written

template <typename S>
class Output {
 public:
  Output(int64_t size, int64_t offset)
      : begin_(kGuard + offset), size_(size), values_(begin_ + size + kGuard, static_cast<S>(NAN)) {}

  S* data() { return values_.data() + begin_; }
  double operator[](int64_t i) const { return static_cast<double>(values_[begin_ + i]); }
  bool is_within_bounds() const {
    const auto untouched = [](S value) { return std::isnan(static_cast<double>(value)); };
    return std::all_of(values_.begin(), values_.begin() + begin_, untouched) &&
           std::all_of(values_.begin() + begin_ + size_, values_.end(), untouched);
  }

 private:
  int64_t begin_, size_;
  std::vector<S> values_;
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Rounded once to the type, after a few roundings of the arithmetic's.
template <typename S>
void expect_near(double found, double exact) {
  const double bound = static_cast<double>(std::numeric_limits<S>::epsilon()) * std::abs(exact) +
                       64 * static_cast<double>(std::numeric_limits<Math<S>>::epsilon());
  EXPECT_NEAR(found, exact, bound);
}

struct Shape {
  int64_t examples, hidden, offset;
};

// Rows of whole vectors, over several blocks; others; tensors that do not begin at one.
const Shape kShapes[] = {{1, 1, 0}, {3, 64, 0}, {70, 40, 0}, {70, 40, 1}, {5, 7, 0}, {300, 3, 0}, {2, 2000, 0}};

template <typename S>
struct Given {
  Shape shape;
  std::vector<S> gates, c, grad_h, grad_c;

  explicit Given(const Shape& s)
      : shape(s),
        gates(normal<S>(s.offset + 4 * s.examples * s.hidden, 1)),
        c(normal<S>(s.offset + s.examples * s.hidden, 2)),
        grad_h(normal<S>(s.offset + s.examples * s.hidden, 3)),
        grad_c(normal<S>(s.offset + s.examples * s.hidden, 4)) {}

  // i, f, g and o of an element of c
  std::array<double, 4> of(int64_t i) const {
    std::array<double, 4> four{};
    for (int64_t k = 0; k < 4; ++k) {
      four[k] =
          static_cast<double>(gates[shape.offset + (4 * (i / shape.hidden) + k) * shape.hidden + i % shape.hidden]);
    }
    return four;
  }
  double at(const std::vector<S>& values, int64_t i) const { return static_cast<double>(values[shape.offset + i]); }
  int64_t count() const { return shape.examples * shape.hidden; }
};

template <typename S>
class LstmCell : public ::testing::Test {};
TYPED_TEST_SUITE(LstmCell, FloatingTypes);

TYPED_TEST(LstmCell, IsItsDefinition) {
  for (const Shape& shape : kShapes) {
    const Given<TypeParam> in(shape);
    Output<TypeParam> h(in.count(), shape.offset), c(in.count(), shape.offset);
    cuda::lstm::forward<TypeParam, Math<TypeParam>>(Launch{7}, shape.examples, shape.hidden,
                                                    in.gates.data() + shape.offset, in.c.data() + shape.offset,
                                                    h.data(), c.data());
    for (int64_t j = 0; j < in.count(); ++j) {
      const auto [i, f, g, o] = in.of(j);
      const double next = sigmoid(f) * in.at(in.c, j) + sigmoid(i) * std::tanh(g);
      expect_near<TypeParam>(c[j], next);
      expect_near<TypeParam>(h[j], sigmoid(o) * std::tanh(next));
    }
    EXPECT_TRUE(h.is_within_bounds() && c.is_within_bounds());
  }
}

TYPED_TEST(LstmCell, GradientsAreItsDerivatives) {
  for (const Shape& shape : kShapes) {
    const Given<TypeParam> in(shape);
    Output<TypeParam> gates(4 * in.count(), shape.offset), c(in.count(), shape.offset);
    cuda::lstm::backward<TypeParam, Math<TypeParam>>(
        Launch{7}, shape.examples, shape.hidden, in.grad_h.data() + shape.offset, in.grad_c.data() + shape.offset,
        in.gates.data() + shape.offset, in.c.data() + shape.offset, gates.data(), c.data());
    for (int64_t j = 0; j < in.count(); ++j) {
      const auto [i, f, g, o] = in.of(j);
      const double before = in.at(in.c, j), next = std::tanh(sigmoid(f) * before + sigmoid(i) * std::tanh(g));
      const double of_next = in.at(in.grad_c, j) + in.at(in.grad_h, j) * sigmoid(o) * (1 - next * next);
      const auto slope = [](double x) { return sigmoid(x) * sigmoid(-x); };
      const int64_t first = 4 * (j / shape.hidden) * shape.hidden + j % shape.hidden;
      expect_near<TypeParam>(gates[first], of_next * std::tanh(g) * slope(i));
      expect_near<TypeParam>(gates[first + shape.hidden], of_next * before * slope(f));
      expect_near<TypeParam>(gates[first + 2 * shape.hidden], of_next * sigmoid(i) / std::pow(std::cosh(g), 2));
      expect_near<TypeParam>(gates[first + 3 * shape.hidden], in.at(in.grad_h, j) * next * slope(o));
      expect_near<TypeParam>(c[j], of_next * sigmoid(f));
    }
    EXPECT_TRUE(gates.is_within_bounds() && c.is_within_bounds());
  }
}

TYPED_TEST(LstmCell, NothingIsLaunchedForNothing) {
  int launches = 0;
  TypeParam* const none = nullptr;
  cuda::lstm::forward<TypeParam, Math<TypeParam>>(Launch{0, &launches}, 0, 4, none, none, none, none);
  cuda::lstm::backward<TypeParam, Math<TypeParam>>(Launch{0, &launches}, 3, 0, none, none, none, none, none, none);
  EXPECT_EQ(launches, 0);
}

}  // namespace
}  // namespace cctorch::device
