#include <ATen/ops/cat.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <cctorch/nn/layers.h>
#include <cctorch/nn/repair.h>
#include <torch/types.h>

#include <algorithm>
#include <map>
#include <optional>
#include <unordered_map>
#include <utility>

#include "csrc/nn/eval_mode.h"
#include "csrc/nn/layer_parts.h"
#include "csrc/nn/named_layers.h"
#include "csrc/nn/watching.h"

namespace cctorch::repair {

namespace {

using Named = std::map<std::string, Compressible*>;

// A layer in order of execution. `norm`: the BatchNorm that reads it, or nothing. `joins`: a shortcut is added.
struct Place {
  std::string layer, norm;
  bool joins = false;
};

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

bool is_affine(const Compressible& layer) {
  if (const auto* const convolution = dynamic_cast<const nn::Conv2dImpl*>(&layer))
    return convolution->options.groups() == 1;
  return dynamic_cast<const nn::LinearImpl*>(&layer) != nullptr;
}

bool holds_an_intercept(const Compressible& layer) {
  const auto* const norm = dynamic_cast<const nn::BatchNorm2dImpl*>(&layer);
  return norm != nullptr && norm->weight.defined() && norm->running_mean.defined();
}

bool is_constant(const LayerPlan& plan) { return plan.reads_nothing() && !plan.kept_out.empty(); }

// A feature map B x N x H x W of what a linear layer reads or gives.
at::Tensor as_map(const Compressible& layer, const at::Tensor& y) {
  if (dynamic_cast<const nn::LinearImpl*>(&layer) == nullptr) return y;
  return y.dim() > 2 ? y.flatten(1, -2).transpose(1, 2).unsqueeze(3) : y.unsqueeze(2).unsqueeze(3);
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

// What can be fitted: layers under one name, with parameters of their own, and what removed branches leave.
Named candidates(torch::nn::Module& dense, const CompressionPlan& plan) {
  std::unordered_map<const void*, int64_t> uses;
  const std::vector<nn::NamedLayer> layers = nn::named_layers(dense);
  for (const nn::NamedLayer& named : layers) {
    ++uses[named.layer];
    for (const auto& [name, weight] : named.layer->weights()) ++uses[weight.unsafeGetTensorImpl()];
  }
  Named found;
  for (const nn::NamedLayer& named : layers) {
    const LayerPlan* const planned = plan.find(named.name);
    const bool removed = planned != nullptr && planned->reads_nothing();
    const auto weights = named.layer->weights();
    const bool own = uses[named.layer] == 1 && std::ranges::all_of(weights, [&](const auto& weight) {
                       return uses[weight.second.unsafeGetTensorImpl()] == 1;
                     });
    const bool lstm = named.layer->spec(named.name).kind == LayerKind::lstm;
    if (removed ? is_constant(*planned) : lstm || (own && is_affine(*named.layer))) found[named.name] = named.layer;
  }
  return found;
}

std::vector<Compressible*> values_of(const Named& layers) {
  std::vector<Compressible*> values;
  for (const auto& [name, layer] : layers) values.push_back(layer);
  return values;
}

// The dense model: finds the places while the first batch runs, and what it gives there.
class Targets : public Watching {
 public:
  Targets(const Named& layers, const Named& norms, const CompressionPlan& plan, const ModelOptions& options,
          int64_t first_image)
      : Watching(values_of(layers), values_of(norms)), plan_(plan), options_(options), first_image_(first_image) {
    for (const Named* const some : {&layers, &norms}) {
      for (const auto& [name, layer] : *some) names_[layer] = name;
    }
  }

  void run(const std::function<bool()>& next) {
    while (watch(next)) {
      if (!chosen_) choose();
    }
    TORCH_CHECK_VALUE(chosen_, "repair: next_dense ran no batch, expected at least one");
  }

  // How many images the dense model was run on, as its layers saw it.
  int64_t images() const {
    int64_t most = 0;
    for (const auto& [layer, count] : images_) most = std::max(most, count);
    return most;
  }

  const std::vector<Place>& places() const { return places_; }

  // Kept outputs x samples.
  at::Tensor take(const std::string& layer) { return at::cat(std::exchange(samples_.at(layer), {}), 1); }

 protected:
  void on_output(Compressible& layer, const at::Tensor& y) override {
    order_.push_back(&layer);
    begin_[&layer] = first_image_ + images_[&layer];
    images_[&layer] += y.size(0);
    record({.layer = &layer}, false, y);
  }
  void on_norm(const Origin& origin, const at::Tensor& y) override {
    normed_.push_back(origin);
    record(origin, false, y);
  }
  void on_join(const Origin& origin, const at::Tensor&, const at::Tensor&) override { joined_.push_back(origin); }
  void on_joined(const Origin& origin, const at::Tensor& sum) override { record(origin, true, sum); }
  void on_use(Compressible& layer) override { used_.insert(&layer); }

 private:
  // Where a target may be taken: behind a layer, its norm, or the addition.
  struct Spot {
    Origin origin;
    bool joined;
    at::Tensor samples;
  };

  void record(const Origin& origin, bool joined, const at::Tensor& y) {
    const std::string& name = names_.at(origin.layer);
    if (chosen_) {
      const auto place = places_by_name_.find(name);
      if (place == places_by_name_.end() || !is_spot_of(*place->second, origin, joined)) return;
      samples_[name].push_back(sampled(*origin.layer, name, y));
    } else if (origin.layer->spec(name).kind != LayerKind::lstm) {
      spots_.push_back({origin, joined, sampled(*origin.layer, name, y)});
    }
  }

  at::Tensor sampled(const Compressible& layer, const std::string& name, const at::Tensor& y) {
    at::Tensor map = as_map(layer, y);
    const LayerPlan* const planned = plan_.find(name);
    if (planned != nullptr && static_cast<int64_t>(planned->kept_out.size()) < planned->out_channels)
      map = map.index_select(1, at::tensor(planned->kept_out, at::TensorOptions(y.device()).dtype(at::kLong)));
    return output_samples(map, options_.step, begin_.at(&layer));
  }

  bool is_spot_of(const Place& place, const Origin& origin, bool joined) const {
    if (place.joins != joined) return false;
    return place.norm == (origin.norm == nullptr ? "" : names_.at(origin.norm));
  }

  Place place_of(Compressible* layer) const {
    const auto is_its = [&](const Origin& origin) { return origin.layer == layer; };
    const auto norms = std::ranges::count_if(normed_, is_its);
    const auto read = std::ranges::find_if(normed_, is_its);
    // A norm that runs for others too, one of several, or one beside which the output is used as it is.
    const bool shared =
        norms != 1 || std::ranges::count(normed_, read->norm, &Origin::norm) != 1 || used_.contains(layer);
    Compressible* const norm = shared ? nullptr : read->norm;
    const auto joins = std::ranges::count_if(joined_, is_its);
    // A norm would have read the output that the fit, at the addition, replaces.
    const bool joined = joins == 1 && std::ranges::find_if(joined_, is_its)->norm == norm && (norm || norms == 0);
    return {names_.at(layer), norm == nullptr ? "" : names_.at(norm), joined && options_.shortcuts};
  }

  // From the first layer on that the plan changes.
  void choose() {
    const auto changes = [&](const Compressible* layer) {
      const LayerPlan* const planned = plan_.find(names_.at(layer));
      return planned != nullptr && !planned->is_unchanged();
    };
    for (auto first = std::ranges::find_if(order_, changes); first != order_.end(); ++first) {
      const bool once = std::ranges::count(order_, *first) == 1;
      if (once && (*first)->spec("").kind != LayerKind::lstm) places_.push_back(place_of(*first));
    }
    for (const Place& place : places_) places_by_name_[place.layer] = &place;
    for (Spot& spot : spots_) {
      const auto place = places_by_name_.find(names_.at(spot.origin.layer));
      if (place != places_by_name_.end() && is_spot_of(*place->second, spot.origin, spot.joined))
        samples_[place->first].push_back(std::move(spot.samples));
    }
    spots_.clear();
    chosen_ = true;
  }

  const CompressionPlan& plan_;
  const ModelOptions& options_;
  const int64_t first_image_;
  std::unordered_map<const Compressible*, std::string> names_;
  std::unordered_map<const Compressible*, int64_t> images_, begin_;
  std::vector<Compressible*> order_;
  std::vector<Origin> normed_, joined_;
  std::unordered_set<Compressible*> used_;
  std::vector<Spot> spots_;
  bool chosen_ = false;
  std::vector<Place> places_;
  std::map<std::string, const Place*> places_by_name_;
  std::map<std::string, std::vector<at::Tensor>> samples_;
};

std::optional<Norm> norm_of(Compressible* layer) {
  if (layer == nullptr) return std::nullopt;
  const auto& norm = dynamic_cast<nn::BatchNorm2dImpl&>(*layer);
  return Norm{norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.options.eps()};
}

template <typename Layer>
Affine affine_of(const Layer& layer, Compressible* norm) {
  return {layer.weight, layer.first, layer.second, layer.bias, norm_of(norm)};
}

Affine affine_of(Compressible& layer, Compressible* norm) {
  if (const auto* const convolution = dynamic_cast<nn::Conv2dImpl*>(&layer)) return affine_of(*convolution, norm);
  return affine_of(dynamic_cast<nn::LinearImpl&>(layer), norm);
}

at::Tensor bias_of(Compressible& layer) {
  if (const auto* const convolution = dynamic_cast<nn::Conv2dImpl*>(&layer)) return convolution->bias;
  if (const auto* const linear = dynamic_cast<nn::LinearImpl*>(&layer)) return linear->bias;
  return dynamic_cast<nn::BatchNorm2dImpl&>(layer).bias;
}

at::Tensor run(Compressible& layer, const at::Tensor& x) {
  if (auto* const convolution = dynamic_cast<nn::Conv2dImpl*>(&layer)) return convolution->forward(x);
  if (auto* const linear = dynamic_cast<nn::LinearImpl*>(&layer)) return linear->forward(x);
  return dynamic_cast<nn::BatchNorm2dImpl&>(layer).forward(x);
}

// What is left of a removed residual branch, behind its norm if there is one: the mean of the targets.
LayerFit fit_constant(const std::string& name, const at::Tensor& bias, const std::optional<Norm>& norm,
                      const at::Tensor& target, const distributed::Ranks& ranks) {
  const at::Tensor wide = target.to(at::kDouble);
  const at::Tensor count = at::full({1}, static_cast<double>(target.size(1)), wide.options());
  const at::Tensor sums = at::cat({wide.sum(1), wide.square().sum(1), count});
  ranks.sum_(sums);
  const int64_t outputs = target.size(0);
  const at::Tensor samples = sums[2 * outputs];
  const at::Tensor mean = sums.narrow(0, 0, outputs) / samples, square = sums.narrow(0, outputs, outputs) / samples;
  TORCH_CHECK_VALUE(square.isfinite().all().item<bool>(), "the wanted outputs are NaN or infinite");
  at::Tensor now = bias.to(at::kDouble);
  if (norm) {
    const at::Tensor slope = norm->weight.to(at::kDouble) / (norm->running_var.to(at::kDouble) + norm->eps).sqrt();
    now = slope * (now - norm->running_mean.to(at::kDouble)) + norm->bias.to(at::kDouble);
    norm->running_mean.copy_(bias);
    norm->bias.copy_(mean);
  } else {
    now = now.clone();
    bias.copy_(mean);
  }
  const auto spread = (square - mean.square()).clamp_min(0).sum().item<double>();
  const auto before = (mean - now).square().sum().item<double>();
  return {name, samples.item<int64_t>(), 0, spread > 0 ? (spread + before) / spread : 1.0, 1.0};
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
    if (layer.plan() && layer.plan()->reads_nothing()) {
      fits.push_back(fit_constant(place.layer, bias_of(layer), norm_of(norm), target, ranks_));
      return;
    }
    const Affine affine = affine_of(layer, norm);
    Moments moments(affine.inputs(), affine.outputs());
    moments.add_conv2d(as_map(layer, input), target, window_of(layer), options_.step, first_image_);
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

  Named layers = candidates(dense, plan), norms;
  for (const auto& [name, layer] : of_dense) {
    if (!layers.contains(name) && holds_an_intercept(*layer)) norms[name] = layer;
  }
  Targets targets(layers, norms, plan, options, first_image);
  {
    const EvalMode eval(dense);
    targets.run(next_dense);
  }
  TORCH_CHECK_VALUE(targets.places().empty() || targets.images() == images, "repair: next_dense ran ", targets.images(),
                    " images, expected the ", images, " that forward runs");

  layers.clear(), norms.clear();
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
