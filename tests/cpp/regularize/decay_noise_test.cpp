#include "csrc/ops/cpu/simd/decay_noise.h"

#include <ATen/ATen.h>
#include <ATen/core/MT19937RNGEngine.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <tuple>
#include <vector>

#include "csrc/ops/cpu/channelwise.h"
#include "csrc/ops/cpu/simd/mt19937.h"

namespace cctorch::regularize {
namespace {

template <typename Loops>
Loops of_isa(Isa wanted, Loops baseline, Loops avx2, Loops avx512) {
  return wanted == Isa::kAvx512 ? avx512 : wanted == Isa::kAvx2 ? avx2 : baseline;
}

class Mt19937Test : public testing::TestWithParam<Isa> {};

TEST_P(Mt19937Test, DrawsTheWordsOfATensEngineFromAnyPosition) {
  if (GetParam() > isa()) GTEST_SKIP() << "this processor has not these instructions";
  const auto make = of_isa(GetParam(), &simd::baseline::mt19937, &simd::avx2::mt19937, &simd::avx512::mt19937);
  for (const int64_t skipped : {0, 1, 100, 623, 624, 625, 5000}) {
    at::mt19937 engine(17);
    simd::Mt19937 ours{};
    std::copy_n(engine.data().state_.begin(), simd::Mt19937::kWords, std::begin(ours.state));
    ours.used = simd::Mt19937::kWords;
    for (int64_t i = 0; i < skipped; ++i) engine();
    make().skip(ours, skipped);
    for (const int64_t count : {1, 623, 2000}) {
      std::vector<uint32_t> expected(count), found(count);
      std::generate(expected.begin(), expected.end(), engine);
      // `engine` was copied: it goes on from there.
      for (int64_t i = 0; i < count; ++i) engine();
      make().draw(ours, found.data(), count);
      EXPECT_EQ(found, expected) << skipped << " " << count;
    }
  }
}

const auto kIsas = testing::Values(Isa::kBaseline, Isa::kAvx2, Isa::kAvx512);
INSTANTIATE_TEST_SUITE_P(Isas, Mt19937Test, kIsas);

class DecayNoiseTest : public testing::TestWithParam<std::tuple<Isa, at::ScalarType>> {
 protected:
  simd::DecayNoise loops() const {
    const auto make = of_isa(std::get<0>(GetParam()), &simd::baseline::decay_noise, &simd::avx2::decay_noise,
                             &simd::avx512::decay_noise);
    return make(channelwise::storage(type()));
  }
  at::ScalarType type() const { return std::get<1>(GetParam()); }
};

TEST_P(DecayNoiseTest, ScalesAsMulDoes) {
  if (std::get<0>(GetParam()) > isa()) GTEST_SKIP() << "this processor has not these instructions";
  at::manual_seed(1);
  for (const int64_t n : {1, 7, 512, 1337}) {
    const at::Tensor x = at::randn({n}, at::kDouble).to(type()), y = at::empty_like(x);
    loops().scale(x.const_data_ptr(), y.mutable_data_ptr(), n, 0.7);
    EXPECT_TRUE(y.equal(x * 0.7)) << n;
  }
}

// Rounded product by product and sum by sum, with no fused multiply-add.
TEST_P(DecayNoiseTest, AddsWhatRandDraws) {
  if (std::get<0>(GetParam()) > isa()) GTEST_SKIP() << "this processor has not these instructions";
  for (const int64_t n : {1, 7, 512, 1337}) {
    at::manual_seed(n);
    const at::Tensor u = at::rand({n}, type()), x = at::randn({n}, at::kDouble).to(type()), y = at::empty_like(x);
    const at::Tensor amplitude = at::scalar_tensor(0.37, at::kDouble).to(type());
    std::vector<uint32_t> words(2 * n);
    std::generate(words.begin(), words.end(), at::mt19937(n));
    loops().add_uniform(x.const_data_ptr(), y.mutable_data_ptr(), n, words.data(), amplitude.item<double>());
    EXPECT_TRUE(y.equal(x + (u * 2 - 1) * amplitude)) << n;
  }
}

INSTANTIATE_TEST_SUITE_P(Types, DecayNoiseTest,
                         testing::Combine(kIsas, testing::Values(at::kFloat, at::kDouble, at::kHalf, at::kBFloat16)));

}  // namespace
}  // namespace cctorch::regularize
