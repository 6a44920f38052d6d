#include <ATen/ATen.h>
#include <cctorch/repair.h>

#include <algorithm>
#include <functional>
#include <tuple>

#include "csrc/repair/alternating.h"

namespace cctorch::repair {

namespace {

// The moments that the weight sees: around the means where an intercept takes care of those, else around zero.
struct Problem {
  at::Tensor input, cross, target;  // x x^T, y x^T, the sum of y^2 for each output: sums over the samples
  at::Tensor regularized;           // input + ridge
  double ridge;
};

at::Tensor unfolded(const at::Tensor& weight) { return weight.detach().to(at::kDouble).flatten(1); }

void check(const Moments& moments, const at::Tensor& weight, const at::Tensor& intercept, const Options& options) {
  TORCH_CHECK_VALUE(moments.samples() > 0, "repair: no samples, expected at least one");
  TORCH_CHECK_VALUE(options.ridge > 0, "repair: ridge = ", options.ridge, ", expected above 0");
  const at::Tensor& cross = moments.cross_moment();
  TORCH_CHECK_VALUE(weight.dim() >= 2 && weight.size(0) == cross.size(0) &&
                        weight.numel() == cross.size(0) * cross.size(1) && intercept.dim() == 1 &&
                        intercept.size(0) == cross.size(0),
                    "repair: a weight of shape ", weight.sizes(), " and an intercept of shape ", intercept.sizes(),
                    ", expected ", cross.size(0), " x ", cross.size(1), " and ", cross.size(0));
  for (const at::Tensor& sums : {moments.input_moment(), cross, moments.input_mean(), moments.output_mean()}) {
    TORCH_CHECK_VALUE(at::isfinite(sums).all().item<bool>(),
                      "repair: the inputs or the wanted outputs hold NaN or infinite values");
  }
  for (const at::Tensor& given : {weight, intercept}) {
    TORCH_CHECK_VALUE(at::isfinite(given).all().item<bool>(),
                      "repair: the weight or what follows it holds NaN or infinite values");
  }
}

Problem problem(const Moments& moments, const at::Tensor& intercept, const Options& options) {
  Problem p{moments.input_moment(), moments.cross_moment(), moments.output_square(), {}, 0.0};
  const auto samples = static_cast<double>(moments.samples());
  p.ridge = options.ridge * p.input.diagonal().mean().item<double>();
  if (!options.intercept) {
    const at::Tensor wanted = moments.output_mean() - intercept;
    p.input = at::addr(p.input, moments.input_mean(), moments.input_mean(), 1, samples);
    p.cross = at::addr(p.cross, wanted, moments.input_mean(), 1, samples);
    p.target = at::addcmul(p.target, wanted, wanted, samples);
    p.ridge = options.ridge * p.input.diagonal().mean().item<double>();
  }
  return p;
}

// The factor of input + ridge. Sums of float32 products can make a singular matrix indefinite by more than a small
// ridge: then the ridge grows.
at::Tensor factor(Problem& p) {
  while (true) {
    p.regularized = p.input.clone();
    p.regularized.diagonal().add_(p.ridge);
    const auto [lower, failed] = at::linalg_cholesky_ex(p.regularized);
    if (failed.item<int>() == 0) return lower;
    p.ridge *= 10;
  }
}

// The sum of squares that W leaves.
double residual(const Problem& p, const at::Tensor& weight) {
  const at::Tensor made = at::mm(weight, p.input) - 2 * p.cross;
  return std::max(0.0, (p.target.sum() + made.mul_(weight).sum()).item<double>());
}

// What comes closest to `best` in the metric `regularized` = lower lower^T, among the weights that a layer can have.
using Closest =
    std::function<at::Tensor(const at::Tensor& best, const at::Tensor& regularized, const at::Tensor& lower)>;

at::Tensor minimizer(Problem& p, const at::Tensor& before, const Closest& closest) {
  // Inputs that never change say nothing about the weight.
  if (p.ridge == 0) return before;
  const at::Tensor lower = factor(p);
  return closest(at::cholesky_solve((p.cross + p.ridge * before).t(), lower).t(), p.regularized, lower);
}

Fit fit(const Moments& moments, const at::Tensor& weight, const at::Tensor& intercept, const Closest& closest,
        const Options& options) {
  check(moments, weight, intercept, options);
  const at::Tensor before = unfolded(weight), constant = intercept.detach().to(at::kDouble);
  Problem p = problem(moments, constant, options);
  Fit found{minimizer(p, before, closest), constant, 0.0, 0.0};
  double without = residual(p, before), with = residual(p, found.weight);
  // Rounding: an exact weight has nothing to gain.
  if (!(with <= without)) {
    found.weight = before;
    with = without;
  }
  if (options.intercept) {
    const at::Tensor error = moments.output_mean() - at::mv(before, moments.input_mean()) - constant;
    without += static_cast<double>(moments.samples()) * error.square().sum().item<double>();
    found.intercept = moments.output_mean() - at::mv(found.weight, moments.input_mean());
  }
  const auto variance = moments.output_square().sum().item<double>();
  found.before = variance > 0 ? without / variance : 0.0;
  found.after = variance > 0 ? with / variance : 0.0;
  return found;
}

}  // namespace

Fit least_squares(const Moments& moments, const at::Tensor& weight, const at::Tensor& intercept,
                  const Options& options) {
  const Closest any = [](const at::Tensor& best, const at::Tensor&, const at::Tensor&) { return best; };
  return fit(moments, weight, intercept, any, options);
}

Fit reduced_rank(const Moments& moments, const at::Tensor& weight, const at::Tensor& intercept, int64_t rank,
                 const Options& options) {
  TORCH_CHECK_VALUE(rank >= 1, "repair: rank = ", rank, ", expected at least 1");
  const Closest truncated = [rank](const at::Tensor& best, const at::Tensor&, const at::Tensor& lower) {
    return truncate(best, lower, rank);
  };
  return fit(moments, weight, intercept, truncated, options);
}

Fit alternating_least_squares(const Moments& moments, const at::Tensor& weight, const at::Tensor& intercept,
                              const at::Tensor& inner, int64_t rank, const Options& options) {
  TORCH_CHECK_VALUE(rank >= 1, "repair: rank = ", rank, ", expected at least 1");
  const int64_t inputs = moments.cross_moment().size(1);
  TORCH_CHECK_VALUE(inner.dim() == 3 && inner.numel() > 0 && inputs % (inner.size(1) * inner.size(2)) == 0,
                    "repair: an inner factor of shape ", inner.sizes(), ", expected rank x channels x columns of ",
                    inputs, " inputs");
  TORCH_CHECK_VALUE(at::isfinite(inner).all().item<bool>(), "repair: the inner factor holds NaN or infinite values");
  const Closest factored = [&](const at::Tensor& best, const at::Tensor& regularized, const at::Tensor&) {
    return alternate(best, regularized, inner.detach().to(best.options()), rank);
  };
  return fit(moments, weight, intercept, factored, options);
}

}  // namespace cctorch::repair
