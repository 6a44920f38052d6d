// The loops over magnitudes and codebooks of every instruction set, beside their definitions.
#include <ATen/ATen.h>
#include <cctorch/cctorch.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "csrc/ops/cpu/channelwise.h"
#include "csrc/ops/cpu/isa.h"
#include "csrc/ops/cpu/simd/codebook.h"
#include "csrc/ops/cpu/simd/magnitudes.h"

namespace cctorch {
namespace {

using channelwise::storage;
using simd::Stores;

std::vector<Isa> all_isas() {
  std::vector<Isa> all{Isa::kBaseline};
  if (isa() >= Isa::kAvx2) all.push_back(Isa::kAvx2);
  if (isa() >= Isa::kAvx512) all.push_back(Isa::kAvx512);
  return all;
}

simd::MagnitudeLoops magnitude_loops(Isa of, at::ScalarType type) {
  if (of == Isa::kAvx512) return simd::avx512::magnitude_loops(storage(type));
  return of == Isa::kAvx2 ? simd::avx2::magnitude_loops(storage(type)) : simd::baseline::magnitude_loops(storage(type));
}

simd::CodebookLoops codebook_loops(Isa of, at::ScalarType type) {
  if (of == Isa::kAvx512) return simd::avx512::codebook_loops(storage(type));
  return of == Isa::kAvx2 ? simd::avx2::codebook_loops(storage(type)) : simd::baseline::codebook_loops(storage(type));
}

const std::vector<at::ScalarType> kTypes{at::kFloat, at::kDouble, at::kHalf, at::kBFloat16};
const std::vector<int64_t> kSizes{0, 1, 7, 16, 100, 513, 3000};

// function(isa, x, |x| in float64) of every instruction set, type and size, with ties.
template <typename Function>
void for_rows(const Function& function) {
  at::manual_seed(3);
  for (const Isa of : all_isas()) {
    for (const auto type : kTypes) {
      for (const int64_t n : kSizes) {
        at::Tensor x = at::randn({n}, at::kDouble);
        x.narrow(0, 0, n / 2).mul_(4).round_();
        x = x.to(type);
        function(of, x, x.to(at::kDouble).abs());
      }
    }
  }
}

double sum_where(const at::Tensor& values, const at::Tensor& condition) {
  return at::where(condition, values, 0.0).sum().item<double>();
}

TEST(MagnitudeLoops, AreTheirDefinitions) {
  for_rows([](Isa of, const at::Tensor& x, const at::Tensor& magnitudes) {
    const auto loops = magnitude_loops(of, x.scalar_type());
    const int64_t n = x.numel();
    const auto all = loops.summary(x.const_data_ptr(), n);
    EXPECT_NEAR(all.sum, magnitudes.sum().item<double>(), 1e-12 * all.sum);
    EXPECT_EQ(all.largest, n == 0 ? 0.0 : magnitudes.max().item<double>());

    const std::array<double, simd::kTails> thresholds{0, 0.25, 0.5, 1, 1.5, 2, 3, 100};
    std::array<simd::Tail, simd::kTails> tails{};
    loops.tails(x.const_data_ptr(), n, thresholds.data(), tails.data());
    for (size_t i = 0; i < thresholds.size(); ++i) {
      const at::Tensor above = magnitudes > thresholds[i];
      EXPECT_EQ(tails[i].count, above.sum().item<double>());
      EXPECT_NEAR(tails[i].sum, sum_where(magnitudes, above), 1e-5 * all.sum);
    }

    std::vector<double> inside(n + 16);
    simd::Outside outside{};
    const int64_t found = loops.cut(x.const_data_ptr(), n, 0.5, 1.5, outside, inside.data());
    const at::Tensor above = magnitudes > 1.5, below = magnitudes <= 0.5;
    EXPECT_EQ(outside.above.count, above.sum().item<double>());
    EXPECT_NEAR(outside.above.sum, sum_where(magnitudes, above), 1e-12 * all.sum);
    EXPECT_NEAR(outside.below, sum_where(magnitudes, below), 1e-12 * all.sum);
    const at::Tensor kept = magnitudes.masked_select(above.logical_or(below).logical_not());
    ASSERT_EQ(found, kept.numel());
    EXPECT_TRUE(at::equal(at::from_blob(inside.data(), {found}, at::kDouble), kept));
  });
}

TEST(MagnitudeLoops, ReplaceComparesExactly) {
  for_rows([](Isa of, const at::Tensor& x, const at::Tensor& magnitudes) {
    const auto loops = magnitude_loops(of, x.scalar_type());
    // Between numbers of float32, and at a magnitude that is there.
    for (const double bound : {1.0, std::nextafter(1.0, 0.0), std::nextafter(1.0, 2.0), 0.0}) {
      const at::Tensor levels = at::where(magnitudes > bound, 2.0, 0.0), y = at::empty_like(x);
      for (const auto stores : {Stores::kThroughCaches, Stores::kAroundCaches}) {
        y.fill_(7);
        loops.replace(y.mutable_data_ptr(), x.const_data_ptr(), x.numel(), bound, 2.0, 0.0, stores);
        EXPECT_TRUE(at::equal(y.to(at::kDouble), at::where(x < 0, -levels, levels)));
        EXPECT_FALSE(at::signbit(y).logical_and(y == 0).any().item<bool>());
      }
    }
  });
}

TEST(MagnitudeLoops, RanksAreCountsAndSumsOfWhatIsLarger) {
  at::manual_seed(5);
  for (const Isa of : all_isas()) {
    const auto ranks = of == Isa::kAvx512 ? &simd::avx512::ranks
                       : of == Isa::kAvx2 ? &simd::avx2::ranks
                                          : &simd::baseline::ranks;
    for (const int64_t m : {int64_t{0}, int64_t{1}, int64_t{16}, int64_t{37}, simd::kMostRanks}) {
      const at::Tensor x = at::rand({m + simd::kRankLanes}, at::kDouble).mul_(20).round_(), own = x.narrow(0, 0, m);
      std::array<simd::Tail, simd::kMostRanks> tails;
      ranks(x.const_data_ptr<double>(), m, tails.data());
      for (int64_t i = 0; i < m; ++i) {
        EXPECT_EQ(tails[i].count, (own > own[i]).sum().item<double>());
        EXPECT_EQ(tails[i].sum, sum_where(own, own > own[i]));
      }
    }
  }
}

TEST(CodebookLoops, AreTheirDefinitions) {
  for_rows([](Isa of, const at::Tensor& x, const at::Tensor&) {
    const auto loops = codebook_loops(of, x.scalar_type());
    const auto math = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    for (const int64_t count : {1, 2, 5, 96, 97, 300}) {
      const at::Tensor values = std::get<0>(at::sort(at::randn({count}, math)));
      // Bounds that some of x are equal to.
      const at::Tensor bounds = at::arange(512, math).sub_(static_cast<double>(count / 2)).div_(static_cast<double>(4));
      bounds.narrow(0, count - 1, 512 - (count - 1)).fill_(std::numeric_limits<double>::infinity());
      const simd::Codebook book{values.const_data_ptr(), bounds.const_data_ptr(), count};
      const at::Tensor expected = (x.to(math).unsqueeze(-1) > bounds.narrow(0, 0, count - 1)).sum(-1).to(at::kInt);
      const at::Tensor cells = at::empty({x.numel()}, at::kInt), y = at::empty_like(x);
      loops.cells(cells.mutable_data_ptr<int32_t>(), x.const_data_ptr(), x.numel(), book);
      EXPECT_TRUE(at::equal(cells, expected)) << count;
      loops.quantize(y.mutable_data_ptr(), x.const_data_ptr(), x.numel(), book, Stores::kThroughCaches);
      EXPECT_TRUE(at::equal(y, values.index({expected}).to(x.scalar_type()))) << count;
      std::vector<double> sums(count * simd::kCopies);
      std::vector<int64_t> counts(sums.size());
      loops.add(x.const_data_ptr(), x.const_data_ptr(), x.numel(), book, sums.data(), counts.data());
      const at::Tensor members = at::from_blob(counts.data(), {simd::kCopies, count}, at::kLong).sum(0);
      EXPECT_TRUE(at::equal(members, at::bincount(expected, {}, count)));
      const at::Tensor total = at::from_blob(sums.data(), {simd::kCopies, count}, at::kDouble).sum(0);
      EXPECT_TRUE(
          at::allclose(total, at::zeros({count}, at::kDouble).index_add(0, expected, x.to(at::kDouble)), 1e-12, 1e-12));
    }
  });
}

TEST(CodebookLoops, NaNStays) {
  for (const Isa of : all_isas()) {
    for (const int64_t count : {3, 200}) {
      const at::Tensor x = at::tensor({NAN, 0.25F, -NAN}), y = at::empty_like(x);
      const at::Tensor values = at::arange(count, at::kFloat), bounds = at::arange(256, at::kFloat).add_(0.5);
      codebook_loops(of, at::kFloat)
          .quantize(y.mutable_data_ptr(), x.const_data_ptr(), 3,
                    {values.const_data_ptr(), bounds.const_data_ptr(), count}, Stores::kThroughCaches);
      EXPECT_TRUE(at::equal(y.isnan(), x.isnan()));
      EXPECT_EQ(y[1].item<float>(), 0.0F);
    }
  }
}

TEST(CodebookLists, AreTheOperatorOnEach) {
  const std::vector<at::Tensor> xs{at::randn({4, 3, 5, 5}).contiguous(at::MemoryFormat::ChannelsLast),
                                   at::randn({700})};
  const std::vector<at::Tensor> books{at::tensor({0.5F, -1.0F, 0.0F}), at::randn({16})};
  const auto ys = codebook_quant(xs, books), updated = codebook_update(xs, books);
  for (size_t i = 0; i < xs.size(); ++i) {
    const at::Tensor nearest = (xs[i].unsqueeze(-1) - books[i]).abs().argmin(-1);
    EXPECT_TRUE(at::equal(ys[i], books[i].index({nearest})));
    EXPECT_EQ(ys[i].strides(), xs[i].strides());
    for (int64_t k = 0; k < books[i].numel(); ++k) {
      const at::Tensor members = xs[i].masked_select(nearest == k);
      const double expected =
          members.numel() == 0 ? books[i][k].item<double>() : members.mean(at::kDouble).item<double>();
      EXPECT_FLOAT_EQ(updated[i][k].item<float>(), static_cast<float>(expected));
    }
  }
}

}  // namespace
}  // namespace cctorch
