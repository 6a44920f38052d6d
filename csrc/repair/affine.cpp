#include <ATen/TensorOperators.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <cctorch/collaborative.h>
#include <cctorch/repair.h>
#include <torch/types.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace cctorch::repair {

namespace {

// y = weight x + constant, in float64; what the normalization multiplies by is `scale`.
struct Whole {
  at::Tensor weight, constant, scale;
};

at::Tensor own_weight(const Affine& affine) {
  if (affine.weight.defined()) return affine.weight.flatten(1).to(at::kDouble);
  if (!affine.first.defined()) return at::zeros({affine.bias.size(0), 0}, affine.bias.options().dtype(at::kDouble));
  return affine.second.flatten(1).to(at::kDouble).mm(affine.first.flatten(1).to(at::kDouble));
}

Whole whole_of(const Affine& affine) {
  const at::Tensor weight = own_weight(affine);
  const at::Tensor bias =
      affine.bias.defined() ? affine.bias.detach().to(at::kDouble) : at::zeros({weight.size(0)}, weight.options());
  if (!affine.norm) return {weight, bias, at::ones_like(bias)};
  const Norm& norm = *affine.norm;
  const at::Tensor slope = norm.weight.to(at::kDouble) / (norm.running_var.to(at::kDouble) + norm.eps).sqrt();
  // A channel that the norm had silenced is written with a scale of its own.
  const at::Tensor speaks = slope.abs() > 1e-6 * slope.abs().max();
  return {slope.unsqueeze(1) * weight, slope * (bias - norm.running_mean.to(at::kDouble)) + norm.bias.to(at::kDouble),
          at::where(speaks, slope, at::ones_like(slope))};
}

void write_weight(const Affine& affine, const at::Tensor& weight) {
  if (affine.weight.defined()) {
    affine.weight.copy_(weight.view(affine.weight.sizes()));
    return;
  }
  std::vector<int64_t> shape = affine.first.sizes().vec(), channels(affine.first.size(1));
  shape[0] = weight.size(0);
  std::iota(channels.begin(), channels.end(), 0);
  const int64_t rank = std::min({affine.first.size(0), weight.size(0), weight.size(1)});
  const auto [first, second] = collaborative::factorize(weight.view(shape), channels, rank);
  // A plan may give a layer more rank than it has filters left: the rest contributes nothing.
  affine.first.zero_().narrow(0, 0, rank).copy_(first);
  affine.second.narrow(1, 0, rank).copy_(second);
}

void write(const Affine& affine, const Whole& whole, const Fit& fit, const Moments& moments) {
  const at::Tensor weight = fit.weight / whole.scale.unsqueeze(1);
  write_weight(affine, weight);
  if (!affine.norm) {
    if (affine.bias.defined()) affine.bias.copy_(fit.intercept);
    return;
  }
  const Norm& norm = *affine.norm;
  const at::Tensor mean = weight.mv(moments.input_mean());
  const at::Tensor variance =
      (weight.mm(moments.input_moment()) * weight).sum(1).clamp_min(0) / static_cast<double>(moments.samples());
  norm.running_mean.copy_(affine.bias.defined() ? mean + affine.bias.to(at::kDouble) : mean);
  norm.running_var.copy_(variance);
  norm.weight.copy_(whole.scale * (variance + norm.eps).sqrt());
  norm.bias.copy_(whole.scale * mean + fit.intercept);
}

Fit fit_constant(const Affine& affine, const Moments& moments) {
  const at::Tensor &mean = moments.output_mean(), &square = moments.output_square();
  TORCH_CHECK_VALUE(moments.samples() > 0, "repair: no samples, expected at least one");
  TORCH_CHECK_VALUE(square.isfinite().all().item<bool>(), "repair: the wanted outputs hold NaN or infinite values");
  const Whole whole = whole_of(affine);
  const auto off = (mean - whole.constant).square().sum().item<double>() * static_cast<double>(moments.samples());
  const auto spread = square.sum().item<double>();
  if (affine.norm) {
    affine.norm->running_mean.copy_(affine.bias);
    affine.norm->bias.copy_(mean);
  } else {
    affine.bias.copy_(mean);
  }
  return {whole.weight, mean, spread > 0 ? (spread + off) / spread : 1.0, 1.0};
}

}  // namespace

int64_t Affine::inputs() const {
  const at::Tensor& read = weight.defined() ? weight : first;
  return read.defined() ? read.flatten(1).size(1) : 0;
}

int64_t Affine::outputs() const {
  const at::Tensor& writes = weight.defined() ? weight : second.defined() ? second : bias;
  return writes.size(0);
}

Fit fit(const Affine& affine, const Moments& moments, double ridge) {
  const torch::NoGradGuard no_grad;
  if (affine.inputs() == 0) return fit_constant(affine, moments);
  const Whole whole = whole_of(affine);
  const Options options{.ridge = ridge, .intercept = affine.norm || affine.bias.defined()};
  Fit found = affine.weight.defined()
                  ? least_squares(moments, whole.weight, whole.constant, options)
                  : reduced_rank(moments, whole.weight, whole.constant, affine.first.size(0), options);
  if (found.after < found.before) write(affine, whole, found, moments);
  return found;
}

}  // namespace cctorch::repair
