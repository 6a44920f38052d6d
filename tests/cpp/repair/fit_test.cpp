#include <ATen/ATen.h>
#include <cctorch/repair.h>
#include <gtest/gtest.h>
#include <torch/optim/lbfgs.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

namespace cctorch::repair {
namespace {

struct Samples {
  at::Tensor x, y, weight, constant;
  Moments moments;
};

// Correlated inputs of unequal size, outputs that no weight gives exactly.
Samples samples(int64_t inputs, int64_t outputs, int64_t count) {
  at::manual_seed(0);
  const at::Tensor mix = at::randn({inputs, inputs}, at::kDouble) / at::arange(1, inputs + 1);
  const at::Tensor x = at::mm(mix, at::randn({inputs, count}, at::kDouble)) + 2;
  const at::Tensor y = at::mm(at::randn({outputs, inputs}, at::kDouble), x).tanh() + 1;
  Samples s{x, y, at::randn({outputs, inputs}, at::kDouble), at::randn({outputs}, at::kDouble),
            Moments(inputs, outputs)};
  s.moments.add(x, y);
  return s;
}

double error(const Samples& s, const at::Tensor& weight, const at::Tensor& constant) {
  return (at::mm(weight, s.x) + constant.unsqueeze(1) - s.y).square().sum().item<double>();
}

double variance(const Samples& s) { return (s.y - s.y.mean(1, true)).square().sum().item<double>(); }

TEST(RepairFit, IsTheLeastSquaresSolution) {
  const Samples s = samples(7, 4, 200);
  const Fit fit = least_squares(s.moments, s.weight, s.constant, {.ridge = 1e-13});
  const at::Tensor design = at::cat({s.x, at::ones({1, 200}, at::kDouble)}).t();
  const at::Tensor expected = std::get<0>(at::linalg_lstsq(design, s.y.t())).t();
  EXPECT_TRUE(at::allclose(fit.weight, expected.slice(1, 0, 7), 1e-6, 1e-8));
  EXPECT_TRUE(at::allclose(fit.intercept, expected.select(1, 7), 1e-6, 1e-8));
  EXPECT_NEAR(fit.before, error(s, s.weight, s.constant) / variance(s), 1e-9 * fit.before);
  EXPECT_NEAR(fit.after, error(s, fit.weight, fit.intercept) / variance(s), 1e-9);
}

TEST(RepairFit, WithoutAnInterceptKeepsTheConstant) {
  const Samples s = samples(7, 4, 200);
  const Fit fit = least_squares(s.moments, s.weight, s.constant, {.ridge = 1e-13, .intercept = false});
  const at::Tensor wanted = s.y - s.constant.unsqueeze(1);
  const at::Tensor expected = std::get<0>(at::linalg_lstsq(s.x.t(), wanted.t())).t();
  EXPECT_TRUE(at::allclose(fit.weight, expected, 1e-6, 1e-8));
  EXPECT_TRUE(at::equal(fit.intercept, s.constant));
  EXPECT_NEAR(fit.after, error(s, fit.weight, s.constant) / variance(s), 1e-9);
}

TEST(RepairFit, OfReducedRankIsTheTruncationOfWhitenedOutputs) {
  const Samples s = samples(8, 6, 300);
  const at::Tensor x = s.x - s.x.mean(1, true), y = s.y - s.y.mean(1, true);
  const at::Tensor full = std::get<0>(at::linalg_lstsq(x.t(), y.t())).t();
  // y's projection on the inputs, truncated by an SVD of the explicit samples.
  const auto [u, values, vh] = at::linalg_svd(at::mm(full, x), /*full_matrices=*/false);
  for (const int64_t rank : {1, 3, 5}) {
    const at::Tensor basis = u.slice(1, 0, rank);
    const at::Tensor low = at::mm(s.weight.slice(1, 0, rank), s.weight.slice(0, 0, rank));
    const Fit fit = reduced_rank(s.moments, low, s.constant, rank, {.ridge = 1e-13});
    EXPECT_TRUE(at::allclose(fit.weight, at::mm(basis, at::mm(basis.t(), full)), 1e-6, 1e-8)) << rank;
    EXPECT_EQ(at::linalg_matrix_rank(fit.weight, 1e-8).item<int64_t>(), rank);
  }
}

TEST(RepairFit, IsNotImprovedByAnyChangeOfTheFactors) {
  const Samples s = samples(8, 6, 300);
  const int64_t rank = 2;
  const at::Tensor low = at::mm(s.weight.slice(1, 0, rank), s.weight.slice(0, 0, rank));
  const Fit fit = reduced_rank(s.moments, low, s.constant, rank, {.ridge = 1e-13});
  const auto [u, values, vh] = at::linalg_svd(fit.weight, /*full_matrices=*/false);
  const at::Tensor first = vh.slice(0, 0, rank), second = u.slice(1, 0, rank) * values.slice(0, 0, rank);
  const double best = error(s, fit.weight, fit.intercept);
  for (int trial = 0; trial < 200; ++trial) {
    const double size = std::pow(10.0, -(trial % 4));
    const at::Tensor changed = at::mm(second + size * at::randn_like(second), first + size * at::randn_like(first));
    EXPECT_GE(error(s, changed, (s.y - at::mm(changed, s.x)).mean(1)), best * (1 - 1e-9));
  }
}

TEST(RepairFit, KeepsWhatNoSampleShows) {
  Samples s = samples(6, 3, 40);
  s.x.slice(0, 4, 6).fill_(1.5);  // two inputs that never change
  s.moments = Moments(6, 3);
  s.moments.add(s.x, s.y);
  const Fit fit = least_squares(s.moments, s.weight, s.constant);
  EXPECT_TRUE(at::allclose(fit.weight.slice(1, 4, 6), s.weight.slice(1, 4, 6), 1e-9));
  EXPECT_LT(fit.after, fit.before);

  s.x.fill_(1.5);
  s.moments = Moments(6, 3);
  s.moments.add(s.x, s.y);
  const Fit constant = least_squares(s.moments, s.weight, s.constant);
  EXPECT_TRUE(at::equal(constant.weight, s.weight));
  EXPECT_NEAR(constant.after, 1.0, 1e-9);
}

TEST(RepairFit, IsNeverWorseThanWhatWasThere) {
  for (const int64_t count : {1, 2, 5, 9, 100}) {  // fewer samples than inputs, and more
    const Samples s = samples(9, 5, count);
    const at::Tensor low = at::mm(s.weight.slice(1, 0, 2), s.weight.slice(0, 0, 2));
    for (const bool intercept : {true, false}) {
      for (const double ridge : {1e-9, 1e-3, 1.0}) {
        const Options options{ridge, intercept};
        const Fit full = least_squares(s.moments, s.weight, s.constant, options);
        const Fit reduced = reduced_rank(s.moments, low, s.constant, 2, options);
        EXPECT_LE(error(s, full.weight, full.intercept), error(s, s.weight, s.constant) * (1 + 1e-9) + 1e-12);
        EXPECT_LE(error(s, reduced.weight, reduced.intercept), error(s, low, s.constant) * (1 + 1e-9) + 1e-12);
      }
    }
  }
}

TEST(RepairFit, FindsAWeightThatGivesTheOutputsExactly) {
  Samples s = samples(8, 6, 300);
  const at::Tensor truth = at::mm(at::randn({6, 3}, at::kDouble), at::randn({3, 8}, at::kDouble));
  s.moments = Moments(8, 6);
  s.moments.add(s.x, at::mm(truth, s.x) + 7);
  const at::Tensor low = at::mm(s.weight.slice(1, 0, 3), s.weight.slice(0, 0, 3));
  const Fit fit = reduced_rank(s.moments, low, s.constant, 3, {.ridge = 1e-13});
  EXPECT_TRUE(at::allclose(fit.weight, truth, 1e-6, 1e-7));
  EXPECT_LT(fit.after, 1e-10);
  const Fit again = reduced_rank(s.moments, fit.weight, fit.intercept, 3);
  EXPECT_TRUE(at::allclose(again.weight, fit.weight, 1e-6, 1e-8));
}

// The moments of float32 samples of nearly equal inputs can be indefinite by more than the ridge.
TEST(RepairFit, TakesSingularMomentsOfSingleSamples) {
  at::manual_seed(0);
  const at::Tensor x = at::randn({1, 500}).repeat({50, 1}) + 1e-4 * at::randn({50, 500});
  const at::Tensor y = at::randn({3, 500}), weight = at::randn({3, 50}, at::kDouble);
  Moments moments(50, 3);
  moments.add(x, y);
  const Fit fit = least_squares(moments, weight, at::zeros({3}, at::kDouble), {.ridge = 1e-16});
  EXPECT_TRUE(at::isfinite(fit.weight).all().item<bool>());
  EXPECT_LE(fit.after, fit.before);
}

// W[n, (c, i, j)] = sum_r outer[n, r, i] inner[r, c, j].
at::Tensor composed(const at::Tensor& outer, const at::Tensor& inner) {
  return at::einsum("nri,rcj->ncij", {outer, inner}).flatten(1);
}

constexpr int64_t kChannels = 4, kRows = 3, kColumns = 2, kOutputs = 6;

Samples of_windows(int64_t count = 400) { return samples(kChannels * kRows * kColumns, kOutputs, count); }

at::Tensor inner_factor(int64_t rank) { return at::randn({rank, kChannels, kColumns}, at::kDouble); }

at::Tensor outer_factor(int64_t rank) { return at::randn({kOutputs, rank, kRows}, at::kDouble); }

TEST(AlternatingLeastSquares, IsTheOptimumWhereTheInnerFactorLimitsNothing) {
  const Samples s = of_windows();
  const at::Tensor inner = inner_factor(kChannels * kColumns);
  const at::Tensor weight = composed(outer_factor(kChannels * kColumns), inner);
  const Options options{.ridge = 1e-13};
  const Fit any = alternating_least_squares(s.moments, weight, s.constant, inner, kOutputs, options);
  const Fit expected = least_squares(s.moments, weight, s.constant, options);
  EXPECT_TRUE(at::allclose(any.weight, expected.weight, 1e-6, 1e-7));
  EXPECT_NEAR(any.after, expected.after, 1e-9);
  for (const int64_t rank : {1, 2, 4}) {
    const Fit low = alternating_least_squares(s.moments, weight, s.constant, inner, rank, options);
    const Fit best = reduced_rank(s.moments, weight, s.constant, rank, options);
    EXPECT_TRUE(at::allclose(low.weight, best.weight, 1e-6, 1e-7)) << rank;
    EXPECT_NEAR(low.after, best.after, 1e-9) << rank;
  }
}

TEST(AlternatingLeastSquares, FindsTheOuterFactorOfARightInnerOne) {
  Samples s = of_windows();
  const at::Tensor inner = inner_factor(3), truth = composed(outer_factor(3), inner);
  s.moments = Moments(kChannels * kRows * kColumns, kOutputs);
  s.moments.add(s.x, at::mm(truth, s.x) - 3);
  const Fit fit = alternating_least_squares(s.moments, composed(outer_factor(3), inner), s.constant, inner, kOutputs,
                                            {.ridge = 1e-13});
  EXPECT_TRUE(at::allclose(fit.weight, truth, 1e-6, 1e-7));
  EXPECT_LT(fit.after, 1e-10);
}

// Of `weight` as (kOutputs kRows) x (kChannels kColumns), the leading singular vectors: outer and inner factor.
std::pair<at::Tensor, at::Tensor> factors(const at::Tensor& weight, int64_t rank) {
  const at::Tensor whole = weight.view({kOutputs, kChannels, kRows, kColumns}).transpose(1, 2);
  const auto [u, values, vh] = at::linalg_svd(whole.reshape({kOutputs * kRows, -1}), /*full_matrices=*/false);
  return {(u * values).slice(1, 0, rank).reshape({kOutputs, kRows, rank}).transpose(1, 2).contiguous(),
          vh.slice(0, 0, rank).reshape({rank, kChannels, kColumns})};
}

// From the truncation of the best of all weights; what is left to gain is what a long descent of both factors finds.
TEST(AlternatingLeastSquares, LeavesLittleToGain) {
  const Samples s = of_windows();
  const at::Tensor x = s.x - s.x.mean(1, true), y = s.y - s.y.mean(1, true);
  const Options options{.ridge = 1e-13};
  const at::Tensor full =
      least_squares(s.moments, at::zeros({kOutputs, x.size(0)}, at::kDouble), s.constant, options).weight;
  for (const int64_t rank : {1, 2, 4, 6}) {
    const auto [first_outer, first_inner] = factors(full, rank);
    const at::Tensor truncated = composed(first_outer, first_inner);
    const Fit fit = alternating_least_squares(s.moments, truncated, s.constant, first_inner, kOutputs, options);
    auto [outer, inner] = factors(fit.weight, rank);
    ASSERT_TRUE(at::allclose(composed(outer, inner), fit.weight, 1e-9, 1e-9)) << rank;
    const torch::optim::LBFGSOptions thorough =
        torch::optim::LBFGSOptions(1).max_iter(500).tolerance_change(1e-15).line_search_fn("strong_wolfe");
    torch::optim::LBFGS descent({outer.requires_grad_(), inner.requires_grad_()}, thorough);
    const auto loss = [&] { return (at::mm(composed(outer, inner), x) - y).square().sum() / y.square().sum(); };
    descent.step([&] {
      descent.zero_grad();
      const at::Tensor now = loss();
      now.backward();
      return now;
    });
    const double best = loss().item<double>();
    const double from = (at::mm(truncated, x) - y).square().sum().item<double>() / y.square().sum().item<double>();
    EXPECT_LE(best, fit.after * (1 + 1e-6)) << rank;
    EXPECT_LT(fit.after - best, 0.05 * (from - best)) << rank;
  }
}

TEST(AlternatingLeastSquares, IsNeverWorseThanWhatWasThere) {
  for (const int64_t count : {1, 5, 30, 400}) {  // fewer samples than inputs, and more
    const Samples s = of_windows(count);
    for (const int64_t rank : {1, 2, 5, 11}) {  // 11: more than the inner factor has columns
      const at::Tensor inner = inner_factor(rank);
      for (const int64_t of_outer : {1, 3, 6}) {
        const at::Tensor outer = at::einsum("no,ori->nri", {at::randn({kOutputs, of_outer}, at::kDouble),
                                                            at::randn({of_outer, rank, kRows}, at::kDouble)});
        for (const bool intercept : {true, false}) {
          const at::Tensor weight = composed(outer, inner);
          const Fit fit = alternating_least_squares(s.moments, weight, s.constant, inner, of_outer, {1e-3, intercept});
          EXPECT_LE(error(s, fit.weight, fit.intercept), error(s, weight, s.constant) * (1 + 1e-9) + 1e-12);
          EXPECT_LE(at::linalg_matrix_rank(fit.weight, 1e-8).item<int64_t>(), of_outer);
        }
      }
    }
  }
}

TEST(AlternatingLeastSquares, OfZerosKeepsZeros) {
  const Samples s = of_windows();
  Moments moments(kChannels * kRows * kColumns, kOutputs);
  moments.add(s.x, at::zeros_like(s.y));
  const at::Tensor inner = inner_factor(2), none = at::zeros({kOutputs, kChannels * kRows * kColumns}, at::kDouble);
  const Fit fit = alternating_least_squares(moments, none, at::zeros({kOutputs}, at::kDouble), inner, 2);
  EXPECT_TRUE(at::equal(fit.weight, none));
}

TEST(AlternatingLeastSquares, RefusesAnInnerFactorOfOtherInputs) {
  const Samples s = of_windows();
  const at::Tensor weight = composed(outer_factor(2), inner_factor(2));
  for (const at::Tensor& inner :
       {at::randn({2, 5, 2}), at::randn({2, 8}), at::randn({0, 4, 2}), at::randn({2, 8, 6})}) {
    EXPECT_THROW(alternating_least_squares(s.moments, weight, s.constant, inner, 2), c10::Error) << inner.sizes();
  }
  EXPECT_THROW(alternating_least_squares(s.moments, weight, s.constant, inner_factor(2), 0), c10::Error);
}

struct Layout {
  const char* name;
  std::vector<int64_t> first, core, second;
};

class AffineLayout : public testing::TestWithParam<Layout> {};

// The function that the written factors and the norm have is the one whose error the fit reports, and not above
// what was there; more rank than filters, as the plan of a pruned layer may say, does no harm.
TEST_P(AffineLayout, WritesTheFunctionThatItFitted) {
  at::manual_seed(0);
  const auto factor = [](const std::vector<int64_t>& sizes) {
    return sizes.empty() ? at::Tensor() : at::randn(sizes).contiguous(at::MemoryFormat::ChannelsLast);
  };
  const Layout& layout = GetParam();
  const int64_t outputs = layout.second[0];
  Affine affine{
      .bias = {},
      .norm = Norm{at::randn({outputs}), at::randn({outputs}), at::randn({outputs}), at::rand({outputs}) + 0.5}};
  affine.first = factor(layout.first);
  affine.core = factor(layout.core);
  affine.second = factor(layout.second);
  const at::Tensor x = at::randn({20, layout.first[1], 6, 5}),
                   wanted = at::randn({20, outputs, 6, 5}) + x.mean(1, true).relu();
  const auto given = [&] {
    at::Tensor y = x;
    for (const at::Tensor& part : {affine.first, affine.core, affine.second}) {
      if (part.defined()) y = at::conv2d(y, part, {}, 1, {(part.size(2) - 1) / 2, (part.size(3) - 1) / 2});
    }
    const Norm& norm = *affine.norm;
    return at::batch_norm(y, norm.weight, norm.bias, norm.running_mean, norm.running_var, false, 0.0, norm.eps, false);
  };
  const at::Tensor rows = output_samples(wanted, 1);
  const double spread = (rows - rows.mean(1, true)).square().sum().item<double>();
  const auto error = [&] { return (given() - wanted).square().sum().item<double>() / spread; };
  const bool is_tucker = affine.core.defined();
  const int64_t high = is_tucker ? layout.core[2] : std::max(layout.first[2], layout.second[2]);
  const int64_t wide = is_tucker ? layout.core[3] : layout.first[3];
  Moments moments(affine.inputs(), affine.outputs());
  ASSERT_EQ(affine.inputs(), layout.first[1] * high * wide);
  moments.add_conv2d(x, rows, {.kernel = {high, wide}, .padding = {high / 2, wide / 2}}, 1);
  const double before = error();
  const Fit found = fit(affine, moments);
  EXPECT_NEAR(found.before, before, 1e-4 * before);
  EXPECT_NEAR(found.after, error(), 1e-4);
  EXPECT_LT(found.after, 1.0);
  EXPECT_EQ(affine.first.sizes(), layout.first);
}

INSTANTIATE_TEST_SUITE_P(
    All, AffineLayout,
    testing::Values(Layout{"channel", {2, 5, 3, 3}, {}, {6, 2, 1, 1}},
                    Layout{"spatial", {2, 5, 1, 3}, {}, {6, 2, 3, 1}},
                    Layout{"spatial_of_high_rank", {7, 2, 1, 3}, {}, {2, 7, 3, 1}},
                    Layout{"tucker", {2, 5, 1, 1}, {3, 2, 3, 3}, {6, 3, 1, 1}},
                    Layout{"tucker_of_more_rank_than_filters", {3, 2, 1, 1}, {5, 3, 3, 3}, {2, 5, 1, 1}},
                    Layout{"tucker_of_one", {1, 1, 1, 1}, {1, 1, 3, 3}, {1, 1, 1, 1}}),
    [](const auto& layout) { return layout.param.name; });

TEST(RepairFit, ABiasAloneBecomesTheMean) {
  for (const bool normalized : {false, true}) {
    at::manual_seed(1);
    const at::Tensor y = at::randn({3, 40}, at::kDouble) * 2 + 1;
    Affine affine{.bias = at::randn({3}, at::kDouble)};
    at::Tensor before = affine.bias.clone();
    if (normalized) {
      affine.norm = Norm{at::randn({3}, at::kDouble), at::randn({3}, at::kDouble), at::randn({3}, at::kDouble),
                         at::rand({3}, at::kDouble) + 0.5};
      const Norm& norm = *affine.norm;
      before = (before - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias;
    }
    Moments moments(0, 3);
    for (const at::Tensor& part : y.split(15, 1)) moments.add(at::empty({0, part.size(1)}, at::kDouble), part);
    const Fit found = fit(affine, moments);
    const at::Tensor mean = y.mean(1);
    EXPECT_TRUE(at::allclose(normalized ? affine.norm->bias : affine.bias, mean, 1e-12, 1e-12));
    // Behind a norm the bias goes into its statistics, and nothing of it comes out.
    EXPECT_TRUE(!normalized || at::equal(affine.norm->running_mean, affine.bias));
    const auto error = [&](const at::Tensor& constant) {
      return (y - constant.unsqueeze(1)).square().sum().item<double>();
    };
    EXPECT_NEAR(found.before, error(before) / error(mean), 1e-10 * found.before);
    EXPECT_EQ(found.after, 1);
    EXPECT_THROW(fit(affine, Moments(0, 3)), c10::Error);
    moments.add(at::empty({0, 1}, at::kDouble), at::full({3, 1}, NAN, at::kDouble));
    EXPECT_THROW(fit(affine, moments), c10::Error);
  }
}

TEST(RepairFit, RefusesWhatItCannotFit) {
  const Samples s = samples(4, 3, 10);
  EXPECT_THROW(least_squares(Moments(4, 3), s.weight, s.constant), c10::Error);
  EXPECT_THROW(least_squares(s.moments, s.weight.t(), s.constant), c10::Error);
  EXPECT_THROW(least_squares(s.moments, s.weight, s.constant, {.ridge = 0}), c10::Error);
  EXPECT_THROW(reduced_rank(s.moments, s.weight, s.constant, 0), c10::Error);
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    Moments moments(4, 3);
    moments.add(s.x, s.y.index_fill(1, at::zeros({1}, at::kLong), bad));
    EXPECT_THROW(least_squares(moments, s.weight, s.constant), c10::Error);
    EXPECT_THROW(least_squares(s.moments, s.weight, at::full_like(s.constant, bad)), c10::Error);
    EXPECT_THROW(least_squares(s.moments, at::full_like(s.weight, bad), s.constant), c10::Error);
  }
}

}  // namespace
}  // namespace cctorch::repair
