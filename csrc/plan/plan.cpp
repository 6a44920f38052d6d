#include <c10/util/Exception.h>
#include <cctorch/plan.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <ostream>
#include <set>

namespace cctorch {

namespace {

int64_t size(const std::vector<int64_t>& indices) { return static_cast<int64_t>(indices.size()); }

std::vector<int64_t> all(int64_t count) {
  std::vector<int64_t> indices(count);
  std::iota(indices.begin(), indices.end(), 0);
  return indices;
}

void check_indices(const LayerPlan& layer, const char* field, const std::vector<int64_t>& indices, int64_t channels) {
  for (size_t i = 0; i < indices.size(); ++i) {
    TORCH_CHECK_VALUE(indices[i] >= 0 && indices[i] < channels, "plan: layer '", layer.name, "': ", field, "[", i,
                      "] = ", indices[i], ", expected 0 to ", channels - 1);
    TORCH_CHECK_VALUE(i == 0 || indices[i - 1] < indices[i], "plan: layer '", layer.name, "': ", field,
                      " must be sorted without repeats, but ", indices[i], " follows ", i == 0 ? -1 : indices[i - 1]);
  }
}

void check_reads_nothing(const LayerPlan& layer) {
  TORCH_CHECK_VALUE(layer.gather.empty() && !layer.rank && !layer.rank_in && layer.layout == LowRankLayout::channel &&
                        !layer.mask && !layer.bits,
                    "plan: layer '", layer.name,
                    "' keeps none of its inputs, and so takes no gather, rank, layout, mask or bits");
}

void check_lstm(const LayerPlan& layer) {
  TORCH_CHECK_VALUE(size(layer.kept_in) == layer.in_channels && size(layer.kept_out) == layer.out_channels &&
                        layer.gather.empty() && !layer.mask && !layer.bits,
                    "plan: layer '", layer.name,
                    "': a weight of an lstm keeps all its inputs and outputs, and takes no gather, mask or bits");
  const int64_t highest = std::min(layer.in_channels, layer.out_channels);
  TORCH_CHECK_VALUE(layer.layout == LowRankLayout::channel && !layer.rank_in, "plan: layer '", layer.name,
                    "': a weight of an lstm has the layout channel, and no rank_in");
  TORCH_CHECK_VALUE(!layer.rank || (*layer.rank >= 1 && *layer.rank <= highest), "plan: layer '", layer.name,
                    "': rank = ", layer.rank.value_or(0), ", expected 1 to ", highest);
}

void check_rank(const LayerPlan& layer) {
  const bool tucker = layer.layout == LowRankLayout::tucker;
  TORCH_CHECK_VALUE(layer.layout == LowRankLayout::channel || (layer.rank && layer.kind == LayerKind::conv2d),
                    "plan: layer '", layer.name, "': layout = ", to_string(layer.layout),
                    ", expected a conv2d with a rank");
  TORCH_CHECK_VALUE(layer.rank_in.has_value() == tucker, "plan: layer '", layer.name,
                    "': ", tucker ? "the layout tucker has a rank_in too" : "rank_in is for the layout tucker");
  if (!layer.rank) return;
  // The rows of the layout spatial are kernel_height times as many, which a plan does not know.
  TORCH_CHECK_VALUE(*layer.rank >= 1 && (layer.layout == LowRankLayout::spatial || *layer.rank <= layer.out_channels),
                    "plan: layer '", layer.name, "': rank = ", *layer.rank, ", expected 1 to ", layer.out_channels,
                    " (its output channels)");
  TORCH_CHECK_VALUE(!tucker || (*layer.rank_in >= 1 && *layer.rank_in <= size(layer.kept_in)), "plan: layer '",
                    layer.name, "': rank_in = ", layer.rank_in.value_or(0), ", expected 1 to ", size(layer.kept_in),
                    " (the input channels that it keeps)");
}

void check_layer(const LayerPlan& layer) {
  TORCH_CHECK_VALUE(layer.in_channels > 0 && layer.out_channels > 0, "plan: layer '", layer.name,
                    "': ", layer.in_channels, " -> ", layer.out_channels, " channels, expected at least 1 -> 1");
  check_indices(layer, "kept_in", layer.kept_in, layer.in_channels);
  check_indices(layer, "kept_out", layer.kept_out, layer.out_channels);
  if (layer.kind == LayerKind::lstm) {
    check_lstm(layer);
    return;
  }
  if (layer.reads_nothing()) {
    check_reads_nothing(layer);
    return;
  }
  check_rank(layer);
  TORCH_CHECK_VALUE(!layer.kept_out.empty(), "plan: layer '", layer.name,
                    "': kept_out is empty, but it reads inputs: keep at least one, or empty kept_in too");
  if (!layer.gather.empty()) {
    TORCH_CHECK_VALUE(layer.gather.size() == layer.kept_in.size(), "plan: layer '", layer.name, "': gather has ",
                      layer.gather.size(), " entries, expected one for each of the ", layer.kept_in.size(), " kept_in");
    check_indices(layer, "gather", layer.gather, layer.in_channels);
  }
  const bool passes_channels_on = layer.kind == LayerKind::batch_norm2d || layer.kind == LayerKind::depthwise_conv2d;
  if (passes_channels_on) {
    TORCH_CHECK_VALUE(layer.kept_in == layer.kept_out, "plan: layer '", layer.name, "': a ", to_string(layer.kind),
                      " keeps the same channels at its input and output, but kept_in and kept_out differ");
    TORCH_CHECK_VALUE(!layer.rank && layer.gather.empty(), "plan: layer '", layer.name, "': a ", to_string(layer.kind),
                      " takes neither rank nor gather");
  }
  if (layer.bits) {
    TORCH_CHECK_VALUE(*layer.bits >= 2 && *layer.bits <= 16, "plan: layer '", layer.name, "': bits = ", *layer.bits,
                      ", expected 2 to 16");
  }
  if (layer.mask) {
    const MaskPlan& mask = *layer.mask;
    TORCH_CHECK_VALUE(mask.sparsity >= 0 && mask.sparsity < 1, "plan: layer '", layer.name,
                      "': mask sparsity = ", mask.sparsity, ", expected at least 0 and below 1");
    TORCH_CHECK_VALUE(mask.n >= 1 && mask.n <= mask.m, "plan: layer '", layer.name, "': mask keeps ", mask.n, " of ",
                      mask.m, ", expected 1 <= n <= m");
  }
}

std::string summary(const LayerPlan& layer) {
  std::string text = fmt::format("  {:<32} {:>5} -> {:<5} in {:>5}  out {:>5}", layer.name, layer.in_channels,
                                 layer.out_channels, layer.kept_in.size(), layer.kept_out.size());
  if (layer.reads_nothing()) return text + (layer.kept_out.empty() ? "  removed" : "  constant");
  if (layer.rank) text += fmt::format("  rank {}", *layer.rank);
  if (layer.rank_in) text += fmt::format(" x {}", *layer.rank_in);
  if (layer.layout != LowRankLayout::channel) text += fmt::format(" {}", to_string(layer.layout));
  if (!layer.gather.empty()) text += "  gather";
  if (layer.mask) text += fmt::format("  mask {}", to_string(layer.mask->kind));
  if (layer.bits) text += fmt::format("  {} bits", *layer.bits);
  return text;
}

}  // namespace

std::string_view to_string(LayerKind kind) {
  switch (kind) {
    case LayerKind::conv2d:
      return "conv2d";
    case LayerKind::depthwise_conv2d:
      return "depthwise_conv2d";
    case LayerKind::linear:
      return "linear";
    case LayerKind::batch_norm2d:
      return "batch_norm2d";
    case LayerKind::lstm:
      return "lstm";
  }
  TORCH_INTERNAL_ASSERT(false, "unknown LayerKind");
}

std::string_view to_string(LowRankLayout layout) {
  switch (layout) {
    case LowRankLayout::channel:
      return "channel";
    case LowRankLayout::spatial:
      return "spatial";
    case LowRankLayout::tucker:
      return "tucker";
  }
  TORCH_INTERNAL_ASSERT(false, "unknown LowRankLayout");
}

std::string_view to_string(MaskPlan::Kind kind) {
  switch (kind) {
    case MaskPlan::Kind::magnitude:
      return "magnitude";
    case MaskPlan::Kind::nm:
      return "nm";
    case MaskPlan::Kind::channel:
      return "channel";
  }
  TORCH_INTERNAL_ASSERT(false, "unknown MaskPlan::Kind");
}

int64_t LayerSpec::macs() const { return parameters() * positions; }

int64_t LayerSpec::parameters() const {
  if (kind == LayerKind::batch_norm2d) return 0;
  return out_channels * (in_channels / groups) * kernel_size();
}

LayerPlan LayerPlan::unchanged(std::string name, LayerKind kind, int64_t in_channels, int64_t out_channels) {
  LayerPlan plan;
  plan.name = std::move(name);
  plan.kind = kind;
  plan.in_channels = in_channels;
  plan.out_channels = out_channels;
  plan.kept_in = all(in_channels);
  plan.kept_out = all(out_channels);
  return plan;
}

bool LayerPlan::keeps_shape() const {
  return size(kept_in) == in_channels && size(kept_out) == out_channels && gather.empty() && !rank;
}

bool LayerPlan::is_unchanged() const { return keeps_shape() && !mask && !bits; }

const LayerPlan* CompressionPlan::find(std::string_view name) const {
  const auto found = std::find_if(layers.begin(), layers.end(), [&](const LayerPlan& l) { return l.name == name; });
  return found == layers.end() ? nullptr : &*found;
}

LayerPlan* CompressionPlan::find(std::string_view name) {
  return const_cast<LayerPlan*>(std::as_const(*this).find(name));
}

void CompressionPlan::validate() const {
  // JSON has no word for the others: a file that is written could not be read.
  TORCH_CHECK_VALUE(std::isfinite(target), "plan: target = ", target, ", expected a finite number");
  std::set<std::string> names;
  for (const LayerPlan& layer : layers) {
    TORCH_CHECK_VALUE(names.insert(layer.name).second, "plan: layer '", layer.name, "' occurs twice");
    check_layer(layer);
  }
}

std::ostream& operator<<(std::ostream& out, const CompressionPlan& plan) {
  out << fmt::format("CompressionPlan(method={}, target={:g}, {} layers)", plan.method, plan.target,
                     plan.layers.size());
  for (const LayerPlan& layer : plan.layers) {
    if (!layer.is_unchanged()) out << '\n' << summary(layer);
  }
  return out;
}

namespace {

int64_t factored_macs(const LayerSpec& spec, const LayerPlan& plan, int64_t in, int64_t out) {
  const int64_t rank = plan.rank.value_or(0), rank_in = plan.rank_in.value_or(0);
  const int64_t high = spec.kernel_height, wide = spec.kernel_width;
  switch (plan.layout) {
    case LowRankLayout::channel:
      return (in * high * wide * rank + rank * out) * spec.positions;
    case LowRankLayout::spatial:
      return (in * wide * rank * spec.stride_height + rank * high * out) * spec.positions;
    case LowRankLayout::tucker:
      return (in * rank_in * spec.stride_height * spec.stride_width + rank_in * high * wide * rank + rank * out) *
             spec.positions;
  }
  TORCH_INTERNAL_ASSERT(false, "unknown LowRankLayout");
}

}  // namespace

int64_t layer_macs(const LayerSpec& spec, const LayerPlan* plan, bool narrowed) {
  if (!plan || spec.kind == LayerKind::batch_norm2d) return spec.macs();
  if (plan->reads_nothing()) return 0;
  const int64_t in = size(plan->kept_in);
  const int64_t out = narrowed ? size(plan->kept_out) : spec.out_channels;
  if (spec.kind == LayerKind::depthwise_conv2d) return out * spec.kernel_size() * spec.positions;
  if (spec.groups > 1) return spec.macs();
  if (plan->rank) return factored_macs(spec, *plan, in, out);
  return out * in * spec.kernel_size() * spec.positions;
}

namespace {

int64_t model_macs(const std::vector<LayerSpec>& model, const CompressionPlan* plan, bool narrowed) {
  return std::accumulate(model.begin(), model.end(), int64_t{0}, [&](int64_t sum, const LayerSpec& spec) {
    return sum + layer_macs(spec, plan ? plan->find(spec.name) : nullptr, narrowed);
  });
}

}  // namespace

int64_t nominal_macs(const std::vector<LayerSpec>& model, const CompressionPlan& plan) {
  return model_macs(model, &plan, false);
}

int64_t final_macs(const std::vector<LayerSpec>& model, const CompressionPlan& plan) {
  return model_macs(model, &plan, true);
}

int64_t dense_macs(const std::vector<LayerSpec>& model) { return model_macs(model, nullptr, false); }

void drop_idle_ranks(const std::vector<LayerSpec>& model, CompressionPlan& plan) {
  for (const LayerSpec& spec : model) {
    LayerPlan* const factored = plan.find(spec.name);
    if (factored == nullptr || !factored->rank) continue;
    LayerPlan exact = *factored;
    exact.rank.reset();
    exact.rank_in.reset();
    exact.layout = LowRankLayout::channel;
    if (layer_macs(spec, &exact, true) <= layer_macs(spec, factored, true)) *factored = std::move(exact);
  }
}

}  // namespace cctorch
