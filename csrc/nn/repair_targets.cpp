#include "csrc/nn/repair_targets.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/tensor.h>
#include <cctorch/nn/layers.h>
#include <cctorch/nn/lstm.h>

#include <algorithm>
#include <utility>

#include "csrc/nn/named_layers.h"

namespace cctorch::repair {

namespace {

bool is_affine(const Compressible& layer) {
  if (const auto* const convolution = dynamic_cast<const nn::Conv2dImpl*>(&layer))
    return convolution->options.groups() == 1;
  return dynamic_cast<const nn::LinearImpl*>(&layer) != nullptr;
}

bool holds_an_intercept(const Compressible& layer) {
  const auto* const norm = dynamic_cast<const nn::BatchNorm2dImpl*>(&layer);
  return norm != nullptr && norm->weight.defined() && norm->running_mean.defined();
}

bool is_lstm(const Compressible& layer) { return dynamic_cast<const nn::LSTMWeight*>(&layer) != nullptr; }

bool is_constant(const LayerPlan& plan) { return plan.reads_nothing() && !plan.kept_out.empty(); }

}  // namespace

std::vector<Compressible*> values_of(const Named& layers) {
  std::vector<Compressible*> values;
  for (const auto& [name, layer] : layers) values.push_back(layer);
  return values;
}

at::Tensor as_map(const Compressible& layer, const at::Tensor& y) {
  if (dynamic_cast<const nn::LinearImpl*>(&layer) == nullptr) return y;
  return y.dim() > 2 ? y.flatten(1, -2).transpose(1, 2).unsqueeze(3) : y.unsqueeze(2).unsqueeze(3);
}

Candidates::Candidates(torch::nn::Module& dense, const CompressionPlan& plan) {
  std::unordered_map<const void*, int64_t> uses;
  const std::vector<nn::NamedLayer> all = nn::named_layers(dense);
  for (const nn::NamedLayer& named : all) {
    ++uses[named.layer];
    for (const auto& [name, weight] : named.layer->weights()) ++uses[weight.unsafeGetTensorImpl()];
  }
  for (const auto& [name, layer, module] : all) {
    const LayerPlan* const planned = plan.find(name);
    const auto weights = layer->weights();
    const bool own = uses[layer] == 1 && std::ranges::all_of(weights, [&](const auto& weight) {
                       return uses[weight.second.unsafeGetTensorImpl()] == 1;
                     });
    if (planned != nullptr && planned->reads_nothing()) {
      if (is_constant(*planned)) layers[name] = layer;
    } else if (is_lstm(*layer) || (own && is_affine(*layer))) {
      layers[name] = layer;
    } else if (holds_an_intercept(*layer)) {
      norms[name] = layer;
    }
  }
}

Targets::Targets(const Candidates& candidates, const CompressionPlan& plan, const ModelOptions& options,
                 int64_t first_image)
    : Watching(values_of(candidates.layers), values_of(candidates.norms)),
      plan_(plan),
      options_(options),
      first_image_(first_image) {
  for (const Named* const some : {&candidates.layers, &candidates.norms}) {
    for (const auto& [name, layer] : *some) names_[layer] = name;
  }
}

void Targets::run(const std::function<bool()>& next) {
  while (watch(next)) {
    if (!chosen_) choose();
  }
  TORCH_CHECK_VALUE(chosen_, "repair: next_dense ran no batch, expected at least one");
}

int64_t Targets::images() const {
  int64_t most = 0;
  for (const Place& place : places_) {
    for (const auto& [layer, count] : images_) {
      if (names_.at(layer) == place.layer) most = std::max(most, count);
    }
  }
  return most;
}

at::Tensor Targets::take(const std::string& layer) { return at::cat(std::exchange(samples_.at(layer), {}), 1); }

void Targets::on_output(Compressible& layer, const at::Tensor& y) {
  order_.push_back(&layer);
  begin_[&layer] = first_image_ + images_[&layer];
  images_[&layer] += y.size(0);
  record({.layer = &layer}, false, y);
}

void Targets::on_norm(const Origin& origin, const at::Tensor& y) {
  normed_.push_back(origin);
  record(origin, false, y);
}

void Targets::on_join(const Origin& origin, const at::Tensor&, const at::Tensor&) { joined_.push_back(origin); }

void Targets::on_joined(const Origin& origin, const at::Tensor& sum) { record(origin, true, sum); }

void Targets::on_use(Compressible& layer) { used_.insert(&layer); }

void Targets::record(const Origin& origin, bool joined, const at::Tensor& y) {
  const std::string& name = names_.at(origin.layer);
  if (chosen_) {
    const auto place = places_by_name_.find(name);
    if (place == places_by_name_.end() || !is_spot_of(*place->second, origin, joined)) return;
    samples_[name].push_back(sampled(*origin.layer, name, y));
  } else if (!is_lstm(*origin.layer)) {
    spots_.push_back({origin, joined, sampled(*origin.layer, name, y)});
  }
}

at::Tensor Targets::sampled(const Compressible& layer, const std::string& name, const at::Tensor& y) const {
  at::Tensor map = as_map(layer, y);
  const LayerPlan* const planned = plan_.find(name);
  if (planned != nullptr && std::cmp_less(planned->kept_out.size(), planned->out_channels))
    map = map.index_select(1, at::tensor(planned->kept_out, at::TensorOptions(y.device()).dtype(at::kLong)));
  return output_samples(map, options_.step, begin_.at(&layer));
}

bool Targets::is_spot_of(const Place& place, const Origin& origin, bool joined) const {
  return place.joins == joined && place.norm == (origin.norm == nullptr ? "" : names_.at(origin.norm));
}

Place Targets::place_of(Compressible* layer) const {
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

// From the first layer on that apply() changes; masks and bits, which plans may also have, act later.
void Targets::choose() {
  const auto changes = [&](const Compressible* layer) {
    const LayerPlan* const planned = plan_.find(names_.at(layer));
    return planned != nullptr && !planned->keeps_shape();
  };
  for (auto first = std::ranges::find_if(order_, changes); first != order_.end(); ++first) {
    const bool once = std::ranges::count(order_, *first) == 1;
    if (once && !is_lstm(**first)) places_.push_back(place_of(*first));
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

}  // namespace cctorch::repair
