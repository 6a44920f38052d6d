#include "csrc/ops/cpu/simd/stores.h"

#include <ATen/ATen.h>
#include <cctorch/fake_quant.h>
#include <cctorch/fake_quant_weights.h>
#include <gtest/gtest.h>

#include <tuple>

#include "csrc/ops/cpu/channelwise.h"

namespace cctorch {
namespace {

using simd::Stores;
using Formula = formula::FakeQuant<float>;

simd::Loops<Formula> loops(Isa wanted, at::ScalarType type) {
  const auto storage = channelwise::storage(type);
  if (wanted == Isa::kAvx512) return simd::avx512::loops<Formula>(storage);
  return wanted == Isa::kAvx2 ? simd::avx2::loops<Formula>(storage) : simd::baseline::loops<Formula>(storage);
}

class StoresTest : public testing::TestWithParam<std::tuple<Isa, at::ScalarType>> {};

// From any element of a cache line on, of any length, and no element beside it.
TEST_P(StoresTest, AroundTheCachesAreTheSameBits) {
  const auto [wanted, type] = GetParam();
  if (wanted > isa()) GTEST_SKIP() << "this processor has not these instructions";
  const auto run = loops(wanted, type);
  const Formula formula{-4, 3};
  at::manual_seed(3);
  const at::Tensor x = at::randn({2000}, type), grad = at::randn({2000}, type);
  const int64_t item = x.element_size();
  for (const int64_t offset : {0, 1, 7, 31}) {
    for (const int64_t size : {0, 1, 40, 512, 513, 1500}) {
      const simd::Fence fence(Stores::kAroundCaches);
      const auto results = [&](Stores stores) {
        const at::Tensor y = at::full({2000}, 9, type), grad_x = at::full({2000}, 9, type);
        auto* to = static_cast<char*>(y.mutable_data_ptr()) + offset * item;
        auto* grad_to = static_cast<char*>(grad_x.mutable_data_ptr()) + offset * item;
        run.forward(formula, to, x.const_data_ptr(), size, 0.3F, stores);
        const double sum =
            run.backward(formula, grad_to, grad.const_data_ptr(), x.const_data_ptr(), size, 0.3F, stores);
        return std::tuple(y, grad_x, sum);
      };
      const auto [y, grad_x, sum] = results(Stores::kAroundCaches);
      const auto [expected_y, expected_grad_x, expected_sum] = results(Stores::kThroughCaches);
      EXPECT_TRUE(at::equal(y, expected_y)) << offset << ", " << size;
      EXPECT_TRUE(at::equal(grad_x, expected_grad_x)) << offset << ", " << size;
      EXPECT_EQ(sum, expected_sum);
      EXPECT_EQ((y == 9).sum().item<int64_t>(), 2000 - size);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, StoresTest,
                         testing::Combine(testing::Values(Isa::kBaseline, Isa::kAvx2, Isa::kAvx512),
                                          testing::Values(at::kFloat, at::kHalf, at::kBFloat16)));

TEST(Stores, OperatorsOnMoreThanACacheHolds) {
  const at::Tensor x = at::randn({64, 70'001});
  ASSERT_EQ(simd::stores_for(static_cast<int64_t>(x.nbytes())), Stores::kAroundCaches);
  const at::Tensor log_scale = at::rand({64}) - 2;
  const at::Tensor y = fake_quant(x, log_scale, -8, 7, 0);
  const auto [quantized, scales] = fake_quant_weights({x}, 4, 0);
  for (const int64_t row : {0, 13, 63}) {
    const at::Tensor part = x.narrow(0, row, 1);
    EXPECT_TRUE(at::equal(y.narrow(0, row, 1), fake_quant(part, log_scale.narrow(0, row, 1), -8, 7, 0)));
    EXPECT_TRUE(at::equal(quantized[0].narrow(0, row, 1), std::get<0>(fake_quant_weights({part}, 4, 0))[0]));
  }
}

}  // namespace
}  // namespace cctorch
