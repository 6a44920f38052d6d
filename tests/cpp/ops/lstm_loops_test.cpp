// The loops of an LSTM's cell for every instruction set, against its definition of ATen's operators in float64.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "csrc/ops/cpu/channelwise.h"
#include "csrc/ops/cpu/isa.h"
#include "csrc/ops/cpu/simd/lstm_cell.h"

namespace cctorch {
namespace {

class LstmLoops : public testing::TestWithParam<std::tuple<Isa, at::ScalarType>> {
 protected:
  void SetUp() override {
    if (std::get<0>(GetParam()) > isa()) GTEST_SKIP() << "this processor has not these instructions";
  }
  at::ScalarType type() const { return std::get<1>(GetParam()); }
  simd::LstmCellLoops loops() const {
    const auto storage = channelwise::storage(type());
    const Isa wanted = std::get<0>(GetParam());
    return wanted == Isa::kAvx512 ? simd::avx512::lstm_cell(storage)
           : wanted == Isa::kAvx2 ? simd::avx2::lstm_cell(storage)
                                  : simd::baseline::lstm_cell(storage);
  }
  at::Tensor random(int64_t n, double factor = 1) const {
    return (at::randn({n}, at::kDouble) * factor).clamp(-30, 30).to(type());
  }

  // Rounded once to the type, after a few roundings of the arithmetic's.
  void expect_near(const at::Tensor& found, const at::Tensor& exact) const {
    const bool half = type() == at::kHalf || type() == at::kBFloat16;
    const double once = type() == at::kBFloat16 ? 0x1p-8 : type() == at::kHalf ? 0x1p-11 : 0;
    const double arithmetic = type() == at::kDouble ? 0x1p-52 : 0x1p-23;
    const at::Tensor bound = exact.abs() * once + 64 * arithmetic + (half ? 0x1p-25 : 0);
    EXPECT_TRUE((found.to(at::kDouble) - exact).abs().le(bound).all().item<bool>());
  }
};

// Shorter than a vector, of whole ones, of several tiles and a rest.
const std::vector<int64_t> kSizes{1, 7, 16, 100, 512, 1300};

TEST_P(LstmLoops, AreTheDefinition) {
  at::manual_seed(5);
  for (const int64_t n : kSizes) {
    const at::Tensor gates = random(4 * n, 4), c = random(n);
    const at::Tensor h = at::empty_like(c), next = at::empty_like(c);
    loops().forward(gates.data_ptr(), c.data_ptr(), n, h.data_ptr(), next.data_ptr());
    const auto part = gates.to(at::kDouble).chunk(4);
    const at::Tensor exact = part[1].sigmoid() * c.to(at::kDouble) + part[0].sigmoid() * part[2].tanh();
    expect_near(next, exact);
    expect_near(h, part[3].sigmoid() * exact.tanh());
  }
}

TEST_P(LstmLoops, GradientsAreTheDerivatives) {
  at::manual_seed(5);
  for (const int64_t n : kSizes) {
    const at::Tensor gates = random(4 * n, 4), c = random(n), grad_h = random(n).clamp(-2, 2),
                     grad_c = random(n).clamp(-2, 2);
    const at::Tensor grad_gates = at::empty_like(gates), previous = at::empty_like(c);
    loops().backward(grad_h.data_ptr(), grad_c.data_ptr(), gates.data_ptr(), c.data_ptr(), n, grad_gates.data_ptr(),
                     previous.data_ptr());
    const auto part = gates.to(at::kDouble).chunk(4);
    const at::Tensor wide = c.to(at::kDouble), of_h = grad_h.to(at::kDouble);
    const auto slope = [](const at::Tensor& x) { return x.sigmoid() * x.neg().sigmoid(); };
    const at::Tensor squashed = (part[1].sigmoid() * wide + part[0].sigmoid() * part[2].tanh()).tanh();
    const at::Tensor grad = grad_c.to(at::kDouble) + of_h * part[3].sigmoid() * (1 - squashed.pow(2));
    const auto found = grad_gates.chunk(4);
    expect_near(found[0], grad * part[2].tanh() * slope(part[0]));
    expect_near(found[1], grad * wide * slope(part[1]));
    expect_near(found[2], grad * part[0].sigmoid() / part[2].cosh().pow(2));
    expect_near(found[3], of_h * squashed * slope(part[3]));
    expect_near(previous, grad * part[1].sigmoid());
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, LstmLoops,
                         testing::Combine(testing::Values(Isa::kBaseline, Isa::kAvx2, Isa::kAvx512),
                                          testing::Values(at::kFloat, at::kDouble, at::kHalf, at::kBFloat16)));

}  // namespace
}  // namespace cctorch
