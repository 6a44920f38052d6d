#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <cctorch/regularized_plan.h>

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

namespace cctorch::regularize {

namespace {

bool gives_up_inputs(const LayerSpec& spec) {
  return spec.kind == LayerKind::linear || (spec.kind == LayerKind::conv2d && spec.groups == 1);
}

// Those with a weight that is not zero, at least one. Of a product of factors, one that is more than its rounding.
std::vector<int64_t> inputs_in_use(const at::Tensor& weight, bool is_product) {
  const at::Tensor largest = weight.abs().transpose(0, 1).flatten(1).amax(1);
  const double epsilon = at::isReducedFloatingType(weight.scalar_type()) || weight.scalar_type() == at::kFloat
                             ? std::numeric_limits<float>::epsilon()
                             : std::numeric_limits<double>::epsilon();
  const at::Tensor zero = is_product ? 8 * epsilon * largest.max() : at::zeros({}, largest.options());
  const at::Tensor used = largest.gt(zero).nonzero().flatten().cpu();
  if (used.numel() == 0) return {0};
  return {used.const_data_ptr<int64_t>(), used.const_data_ptr<int64_t>() + used.numel()};
}

int64_t weights_of(LayerSpec spec, const LayerPlan& plan) {
  spec.positions = spec.stride_height = spec.stride_width = 1;
  return layer_macs(spec, &plan, /*narrowed=*/false);
}

void factor(LayerPlan& plan, const LayerSpec& spec, const LowRankForm& form) {
  const auto inputs = static_cast<int64_t>(plan.kept_in.size());
  const LayerPlan dense = plan;
  // A core that reads as many channels as the layer needs no 1 x 1 convolution before it.
  const bool tucker = form.rank_in.value_or(inputs) < inputs, spatial = form.layout == LowRankLayout::spatial;
  const int64_t columns = inputs * (spatial ? spec.kernel_width : spec.kernel_size());
  plan.rank = std::min({form.rank, spec.out_channels * (spatial ? spec.kernel_height : 1), columns});
  plan.layout = form.rank_in && !tucker ? LowRankLayout::channel : form.layout;
  if (tucker) plan.rank_in = form.rank_in;
  if (weights_of(spec, plan) >= weights_of(spec, dense)) plan = dense;
}

// What rounding to the weight's type leaves of a product of factors, with room; in float32 that may be TF32.
double tolerance(const at::Tensor& weight) {
  if (weight.scalar_type() == at::kDouble) return 1e-6;
  return at::isReducedFloatingType(weight.scalar_type()) ? 2e-2 : 1e-3;
}

at::Tensor nearest(const LowRankForm& form, const at::Tensor& weight) {
  const NamedParameters alone = {{"", weight}};
  if (form.rank_in) return Tucker2({.ranks = std::pair(form.rank, *form.rank_in)}).project(alone).values.front();
  const auto view = form.layout == LowRankLayout::spatial ? MatrixView::spatial : MatrixView::channel;
  return SVD({.rank = form.rank}, view).project(alone).values.front();
}

// Not that Q would leave it as it is: of a Compose that may be otherwise, though it ends with the factorization.
void expect_low_rank(const std::string& layer, const at::Tensor& weight, const LowRankForm& form) {
  const at::Tensor before = weight.detach().to(at::kDouble);
  const auto distance = (nearest(form, before) - before).norm().item<double>();
  const auto norm = before.norm().item<double>();
  TORCH_CHECK_VALUE(distance <= tolerance(weight) * norm, "regularize::plan: the weight w of layer '", layer,
                    "' is not of the rank that Q gives it (the nearest such weight is ", distance / norm,
                    " ||w|| away): call finish() of the events first");
}

Projection projected(Regularizer& regularizer, const NamedParameters& weights) {
  const State before = regularizer.state_dict();
  Projection found = regularizer.project(weights);
  regularizer.load_state_dict(before);
  return found;
}

}  // namespace

CompressionPlan plan(const std::vector<LayerSpec>& model, const NamedParameters& weights, Regularizer& regularizer) {
  const c10::NoGradGuard no_grad;
  CompressionPlan found{.method = "regularization", .target = 0.0, .layers = {}};
  const Projection projection = projected(regularizer, weights);
  for (size_t i = 0; i < projection.parameters.size(); ++i) {
    const auto& [name, weight] = projection.parameters[i];
    const auto spec = std::ranges::find(model, name, &LayerSpec::name);
    TORCH_CHECK_VALUE(spec != model.end(), "regularize::plan: weights has '", name,
                      "', which is no layer of the model");
    LayerPlan layer = LayerPlan::unchanged(name, spec->kind, spec->in_channels, spec->out_channels);
    const std::optional<LowRankForm>& form = projection.storages[i].form;
    if (projection.storages[i].inputs_pruned && gives_up_inputs(*spec)) {
      layer.kept_in = inputs_in_use(weight, form.has_value());
      if (std::cmp_less(layer.kept_in.size(), layer.in_channels)) layer.gather = layer.kept_in;
    }
    if (form && (gives_up_inputs(*spec) || spec->kind == LayerKind::lstm)) {
      expect_low_rank(name, weight, *form);
      factor(layer, *spec, *form);
    }
    if (!layer.is_unchanged()) found.layers.push_back(std::move(layer));
  }
  found.validate();
  return found;
}

}  // namespace cctorch::regularize
