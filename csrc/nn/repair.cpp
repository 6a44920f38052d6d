#include <ATen/ops/empty.h>
#include <cctorch/nn/layers.h>
#include <cctorch/nn/repair.h>
#include <torch/types.h>

#include <algorithm>
#include <optional>
#include <unordered_map>
#include <utility>

#include "csrc/nn/eval_mode.h"
#include "csrc/nn/layer_parts.h"
#include "csrc/nn/named_layers.h"
#include "csrc/nn/repair_targets.h"
#include "csrc/nn/watching.h"

namespace cctorch::repair {

namespace {

Named named(torch::nn::Module& model) {
  Named found;
  for (const nn::NamedLayer& layer : nn::named_layers(model)) found[layer.name] = layer.layer;
  return found;
}

Compressible& find(const Named& layers, const std::string& name, const char* of) {
  const auto found = layers.find(name);
  TORCH_CHECK_VALUE(found != layers.end(), "repair: the ", of, " model has no layer '", name,
                    "': repair(compressed, ..., dense, ...) by the plan that made one of the other");
  return *found->second;
}

Window window_of(const Compressible& layer) {
  const auto* const convolution = dynamic_cast<const nn::Conv2dImpl*>(&layer);
  if (convolution == nullptr) return {};
  const torch::nn::Conv2dOptions& options = convolution->options;
  const auto pair = [](const torch::ExpandingArray<2>& values) {
    return std::array<int64_t, 2>{(*values)[0], (*values)[1]};
  };
  return {pair(options.kernel_size()), pair(options.stride()), pair(nn::numeric_padding(options)),
          pair(options.dilation())};
}

void check(const Named& model, const Named& dense, const CompressionPlan& plan) {
  plan.validate();
  for (const LayerPlan& layer : plan.layers) {
    // Of a torch::nn::LSTM, in a plan that was made in Python.
    if (layer.kind == LayerKind::lstm && layer.is_unchanged() && !dense.contains(layer.name)) continue;
    const Compressible& whole = find(dense, layer.name, "dense");
    TORCH_CHECK_VALUE(!whole.plan(), "repair: layer '", layer.name, "' of the dense model is compressed");
    nn::check_architecture(layer, whole.spec(layer.name));
    const Compressible& small = find(model, layer.name, "compressed");
    TORCH_CHECK_VALUE(layer.keeps_shape() || small.plan(), "repair: layer '", layer.name,
                      "' of the compressed model is dense: apply(model, plan) comes first");
    TORCH_CHECK_VALUE(small.constraints().empty(), "repair: layer '", layer.name,
                      "' is prepared: repair() comes before prepare()");
  }
}

std::optional<Norm> norm_of(Compressible* layer) {
  if (layer == nullptr) return std::nullopt;
  const auto& norm = dynamic_cast<nn::BatchNorm2dImpl&>(*layer);
  return Norm{norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.options.eps()};
}

bool reads_nothing(const Compressible& layer) { return layer.plan() && layer.plan()->reads_nothing(); }

at::Tensor bias_of(Compressible& layer) {
  if (const auto* const convolution = dynamic_cast<nn::Conv2dImpl*>(&layer)) return convolution->bias;
  if (const auto* const linear = dynamic_cast<nn::LinearImpl*>(&layer)) return linear->bias;
  return dynamic_cast<nn::BatchNorm2dImpl&>(layer).bias;
}

template <typename Layer>
Affine affine_of(const Layer& layer, Compressible* norm) {
  return {layer.weight, layer.first, layer.second, layer.bias, norm_of(norm), layer.core};
}

Affine affine_of(Compressible& layer, Compressible* norm) {
  if (reads_nothing(layer)) return {{}, {}, {}, bias_of(layer), norm_of(norm), {}};
  if (const auto* const convolution = dynamic_cast<nn::Conv2dImpl*>(&layer)) return affine_of(*convolution, norm);
  return affine_of(dynamic_cast<nn::LinearImpl&>(layer), norm);
}

at::Tensor run(Compressible& layer, const at::Tensor& x) {
  if (auto* const convolution = dynamic_cast<nn::Conv2dImpl*>(&layer)) return convolution->forward(x);
  if (auto* const linear = dynamic_cast<nn::LinearImpl*>(&layer)) return linear->forward(x);
  return dynamic_cast<nn::BatchNorm2dImpl&>(layer).forward(x);
}

// One forward pass of the compressed model, during which every layer is fitted before its output is used.
class Pass : public Watching {
 public:
  Pass(const Named& layers, const Named& norms, Targets& targets, const ModelOptions& options, int64_t first_image,
       const distributed::Ranks& ranks)
      : Watching(values_of(layers), values_of(norms)),
        layers_(layers),
        norms_(norms),
        targets_(targets),
        options_(options),
        first_image_(first_image),
        ranks_(ranks) {
    for (const Place& place : targets.places()) places_[layers.at(place.layer)] = &place;
  }

  std::vector<LayerFit> fits;

 protected:
  void on_input(Compressible& layer, const at::Tensor& x, const at::Tensor& input) override {
    const Place& place = *places_.at(&layer);
    if (place.joins) {
      waiting_[&layer] = {x, input};
    } else {
      fit_place(place, input, targets_.take(place.layer));
    }
  }

  // Only now is the shortcut known: fit, and compute the output again.
  void on_join(const Origin& origin, const at::Tensor& y, const at::Tensor& shortcut) override {
    const auto waits = waiting_.extract(origin.layer);
    if (waits.empty()) return;
    const auto& [x, input] = waits.mapped();
    const Place& place = *places_.at(origin.layer);
    const at::Tensor target = targets_.take(place.layer);
    target.sub_(output_samples(as_map(*origin.layer, shortcut), options_.step, first_image_));
    fit_place(place, input, target);
    at::Tensor again = run(*origin.layer, x);
    if (!place.norm.empty()) again = run(*norms_.at(place.norm), again);
    y.copy_(again);
  }

 private:
  void fit_place(const Place& place, const at::Tensor& input, const at::Tensor& target) try {
    Compressible& layer = *layers_.at(place.layer);
    Compressible* const norm = place.norm.empty() ? nullptr : norms_.at(place.norm);
    const Affine affine = affine_of(layer, norm);
    Moments moments(affine.inputs(), affine.outputs());
    if (reads_nothing(layer)) {
      moments.add(at::empty({0, target.size(1)}, target.options()), target);
    } else {
      moments.add_conv2d(as_map(layer, input), target, window_of(layer), options_.step, first_image_);
    }
    if (ranks_.count() > 1) moments.all_reduce([&](const at::Tensor& sums) { ranks_.sum_(sums); });
    const Fit found = fit(affine, moments, options_.ridge);
    fits.push_back({place.layer, moments.samples(), affine.inputs(), found.before, found.after});
  } catch (const c10::Error& error) {
    TORCH_CHECK_VALUE(false, "repair: layer '", place.layer, "': ", error.what_without_backtrace());
  }

  const Named &layers_, &norms_;
  Targets& targets_;
  const ModelOptions& options_;
  const int64_t first_image_;
  const distributed::Ranks& ranks_;
  std::unordered_map<const Compressible*, const Place*> places_;
  std::unordered_map<const Compressible*, std::pair<at::Tensor, at::Tensor>> waiting_;
};

std::vector<std::string> of_few_samples(const std::vector<LayerFit>& fits, int64_t step) {
  const auto few = [](const LayerFit& fit) { return fit.samples < fit.unknowns; };
  const auto count = std::ranges::count_if(fits, few);
  if (count == 0) return {};
  const auto first = std::ranges::find_if(fits, few);
  return {c10::str("repair: ", count, " of ", fits.size(), " layers were fitted to fewer samples than an output has ",
                   "weights, first of all '", first->name, "' (", first->samples, " for ", first->unknowns,
                   "): other images may fit worse than before; give more, or a step below ", step)};
}

// The number of this rank's first image.
int64_t first_of(int64_t images, const distributed::Ranks& ranks) {
  const at::Tensor counts = ranks.gather(at::full({}, images, at::kLong));
  TORCH_CHECK_VALUE((counts > 0).all().item<bool>(), "repair: no images on a rank, expected at least one");
  return counts.narrow(0, 0, ranks.rank()).sum().item<int64_t>();
}

// Gives a model back its values, unless it is told not to.
class Restore {
 public:
  explicit Restore(const torch::nn::Module& model) {
    for (const auto& values : {model.parameters(), model.buffers()}) {
      for (const at::Tensor& value : values) before_.emplace_back(value, value.detach().clone());
    }
  }
  ~Restore() {
    for (auto& [value, before] : before_) value.detach().copy_(before);
  }
  Restore(const Restore&) = delete;
  Restore& operator=(const Restore&) = delete;

  void keep() { before_.clear(); }

 private:
  std::vector<std::pair<at::Tensor, at::Tensor>> before_;
};

}  // namespace

Repair repair(torch::nn::Module& model, const std::function<void()>& forward, torch::nn::Module& dense,
              const std::function<bool()>& next_dense, const CompressionPlan& plan, int64_t images,
              const ModelOptions& options, const distributed::Ranks& ranks) {
  const torch::NoGradGuard no_grad;
  const Named of_model = named(model), of_dense = named(dense);
  check(of_model, of_dense, plan);
  const int64_t first_image = first_of(images, ranks);

  const Candidates candidates(dense, plan);
  Targets targets(candidates, plan, options, first_image);
  {
    const EvalMode eval(dense);
    targets.run(next_dense);
  }
  TORCH_CHECK_VALUE(targets.places().empty() || targets.images() == images, "repair: next_dense ran ", targets.images(),
                    " images, expected the ", images, " that forward runs");

  Named layers, norms;
  for (const Place& place : targets.places()) {
    layers[place.layer] = &find(of_model, place.layer, "compressed");
    if (!place.norm.empty()) norms[place.norm] = &find(of_model, place.norm, "compressed");
  }
  Restore restore(model);
  Pass pass(layers, norms, targets, options, first_image, ranks);
  {
    const EvalMode eval(model);
    pass.watch([&] {
      forward();
      return true;
    });
  }
  restore.keep();
  return {pass.fits, of_few_samples(pass.fits, options.step)};
}

}  // namespace cctorch::repair
