#include <ATen/TensorOperators.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/util/accumulate.h>
#include <cctorch/nn/factors.h>
#include <cctorch/plan.h>
#include <cctorch/repair.h>
#include <torch/types.h>

#include <algorithm>
#include <vector>

namespace cctorch::repair {

namespace {

// y = weight x + constant, in float64; what the normalization multiplies by is `scale`.
struct Whole {
  at::Tensor weight, constant, scale;
};

LowRankLayout layout_of(const Affine& affine) {
  if (affine.core.defined()) return LowRankLayout::tucker;
  return affine.second.dim() == 4 && affine.second.size(2) > 1 ? LowRankLayout::spatial : LowRankLayout::channel;
}

// The weight is sum_r outer[n, r, i] inner[r, c, j]: r x C x J.
at::Tensor inner_of(const Affine& affine) {
  const at::Tensor& first = affine.first;
  return first.to(at::kDouble).reshape({first.size(0), first.size(1), -1});
}

// N x r x I.
at::Tensor outer_of(const Affine& affine) {
  const at::Tensor second = affine.second.to(at::kDouble).reshape({affine.second.size(0), affine.second.size(1), -1});
  return affine.core.defined() ? at::tensordot(second.squeeze(2), affine.core.to(at::kDouble).flatten(2), {1}, {0})
                               : second;
}

at::Tensor own_weight(const Affine& affine) {
  if (affine.weight.defined()) return affine.weight.flatten(1).to(at::kDouble);
  if (!affine.first.defined()) return at::zeros({affine.bias.size(0), 0}, affine.bias.options().dtype(at::kDouble));
  return at::einsum("nri,rcj->ncij", {outer_of(affine), inner_of(affine)}).flatten(1);
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

// A plan may give a layer more rank than it has filters left: the rest contributes nothing.
void write_factor(const at::Tensor& factor, const at::Tensor& found) {
  if (!factor.defined()) return;
  factor.zero_().narrow(0, 0, found.size(0)).narrow(1, 0, found.size(1)).copy_(found);
}

void write_factors(const Affine& affine, const at::Tensor& weight) {
  const LowRankLayout layout = layout_of(affine);
  const at::Tensor &first = affine.first, &second = affine.second, &core = affine.core;
  const bool is_spatial = layout == LowRankLayout::spatial, is_tucker = layout == LowRankLayout::tucker;
  std::vector<int64_t> shape = (is_tucker ? core : first).sizes().vec();
  shape[0] = weight.size(0);
  shape[1] = first.size(1);
  if (is_spatial) shape[2] = second.size(2);
  const int64_t rows = weight.size(0) * (is_spatial ? second.size(2) : 1), columns = weight.numel() / rows;
  const LayerKind kind = shape.size() == 2 ? LayerKind::linear : LayerKind::conv2d;
  LayerPlan plan = LayerPlan::unchanged("repair", kind, shape[1], shape[0]);
  plan.layout = layout;
  plan.rank = std::min(second.size(1), is_tucker ? rows : std::min(rows, columns));
  if (is_tucker) plan.rank_in = std::min(first.size(0), first.size(1));
  const nn::Factors found = nn::factorize(weight.view(shape), plan);
  write_factor(first, found.first);
  write_factor(core, found.core);
  write_factor(second, found.second);
}

void write_weight(const Affine& affine, const at::Tensor& weight) {
  if (affine.weight.defined()) {
    affine.weight.copy_(weight.view(affine.weight.sizes()));
  } else {
    write_factors(affine, weight);
  }
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

Fit best_fit(const Affine& affine, const Moments& moments, const Whole& whole, const Options& options) {
  if (affine.weight.defined()) return least_squares(moments, whole.weight, whole.constant, options);
  const int64_t rank = affine.second.size(1);
  if (layout_of(affine) == LowRankLayout::channel) {
    return reduced_rank(moments, whole.weight, whole.constant, rank, options);
  }
  // Nothing but two factors limits the rank of two one-dimensional kernels.
  const int64_t of_outer = affine.core.defined() ? rank : affine.outputs();
  return alternating_least_squares(moments, whole.weight, whole.constant, inner_of(affine), of_outer, options);
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
  const auto size = [](const at::Tensor& factor, size_t from) {
    return c10::multiply_integers(factor.sizes().slice(from));
  };
  if (weight.defined()) return size(weight, 1);
  if (!first.defined()) return 0;
  return size(first, 1) * size(core.defined() ? core : second, 2);
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
  const Fit found = best_fit(affine, moments, whole, options);
  if (found.after < found.before) write(affine, whole, found, moments);
  return found;
}

}  // namespace cctorch::repair
