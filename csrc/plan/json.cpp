#include <c10/util/Exception.h>
#include <cctorch/plan.h>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>

#include <nlohmann/json.hpp>
#include <utility>

// The plan's file format, version 1. Index lists that keep everything are left out, so that a plan stays readable.
namespace cctorch {

namespace {

using nlohmann::json;

constexpr int format_version = 1;
constexpr std::array kinds = {LayerKind::conv2d, LayerKind::depthwise_conv2d, LayerKind::linear,
                              LayerKind::batch_norm2d, LayerKind::lstm};
constexpr std::array layouts = {LowRankLayout::channel, LowRankLayout::spatial, LowRankLayout::tucker};
constexpr std::array mask_kinds = {MaskPlan::Kind::magnitude, MaskPlan::Kind::nm, MaskPlan::Kind::channel};

template <class Kinds>
typename Kinds::value_type parse(const Kinds& all, const char* what, const std::string& text) {
  std::string expected;
  for (const auto kind : all) {
    if (to_string(kind) == text) return kind;
    expected += std::string(expected.empty() ? "" : ", ") + std::string(to_string(kind));
  }
  TORCH_CHECK_VALUE(false, "plan: ", what, " '", text, "', expected one of ", expected);
}

// JSON has no others: "null" would be written, which nobody could read again.
double finite(double value, const std::string& what) {
  TORCH_CHECK_VALUE(std::isfinite(value), "plan: ", what, " = ", value, ", expected a finite number");
  return value;
}

json write(const MaskPlan& mask) {
  json out = {{"kind", to_string(mask.kind)}};
  if (mask.kind == MaskPlan::Kind::nm) {
    out["n"] = mask.n;
    out["m"] = mask.m;
  } else {
    out["sparsity"] = finite(mask.sparsity, "mask sparsity");
  }
  return out;
}

json write(const LayerPlan& layer) {
  json out = {{"name", layer.name},
              {"kind", to_string(layer.kind)},
              {"in_channels", layer.in_channels},
              {"out_channels", layer.out_channels}};
  if (std::cmp_not_equal(layer.kept_in.size(), layer.in_channels)) out["kept_in"] = layer.kept_in;
  if (std::cmp_not_equal(layer.kept_out.size(), layer.out_channels)) out["kept_out"] = layer.kept_out;
  if (!layer.gather.empty()) out["gather"] = layer.gather;
  if (layer.rank) out["rank"] = *layer.rank;
  if (layer.layout != LowRankLayout::channel) out["layout"] = to_string(layer.layout);
  if (layer.rank_in) out["rank_in"] = *layer.rank_in;
  if (layer.mask) out["mask"] = write(*layer.mask);
  if (layer.bits) out["bits"] = *layer.bits;
  return out;
}

// json's own conversion makes 2 of 2.7, and the lowest number of all of those that are too large.
int64_t integer(const json& in, const std::string& what) {
  const bool fits = in.is_number_integer() && (!in.is_number_unsigned() || std::in_range<int64_t>(in.get<uint64_t>()));
  TORCH_CHECK_VALUE(fits, "plan: ", what, " = ", in.dump(), ", expected an integer");
  return in.get<int64_t>();
}

std::vector<int64_t> integers(const json& in, const std::string& what) {
  TORCH_CHECK_VALUE(in.is_array(), "plan: ", what, " = ", in.dump(), ", expected a list of integers");
  std::vector<int64_t> values;
  values.reserve(in.size());
  for (const json& value : in) values.push_back(integer(value, what));
  return values;
}

// A key that is misspelt would change nothing, silently.
void check_keys(const json& in, const std::string& what, std::initializer_list<std::string_view> known) {
  TORCH_CHECK_VALUE(in.is_object(), "plan: ", what, " = ", in.dump(), ", expected an object");
  for (const auto& item : in.items()) {
    TORCH_CHECK_VALUE(std::ranges::find(known, item.key()) != known.end(), "plan: ", what, " has the unknown key '",
                      item.key(), "', expected one of ", fmt::format("{}", fmt::join(known, ", ")));
  }
}

MaskPlan read_mask(const json& in, const std::string& layer) {
  const std::string what = "the mask of " + layer;
  check_keys(in, what, {"kind", "sparsity", "n", "m"});
  MaskPlan mask;
  mask.kind = parse(mask_kinds, "kind", in.at("kind").get<std::string>());
  if (mask.kind == MaskPlan::Kind::nm) {
    mask.n = integer(in.at("n"), what + ": n");
    mask.m = integer(in.at("m"), what + ": m");
  } else {
    in.at("sparsity").get_to(mask.sparsity);
  }
  return mask;
}

LayerPlan read_layer(const json& in) {
  check_keys(in, "a layer",
             {"name", "kind", "in_channels", "out_channels", "kept_in", "kept_out", "gather", "rank", "layout",
              "rank_in", "mask", "bits"});
  const auto name = in.at("name").get<std::string>();
  const std::string what = "layer '" + name + "'";
  const auto in_channels = integer(in.at("in_channels"), what + ": in_channels");
  const auto out_channels = integer(in.at("out_channels"), what + ": out_channels");
  constexpr int64_t most_channels = int64_t{1} << 24;  // a damaged file must not ask for terabytes
  for (const int64_t channels : {in_channels, out_channels}) {
    TORCH_CHECK_VALUE(channels > 0 && channels <= most_channels, "plan: ", what, " has ", channels,
                      " channels, expected 1 to ", most_channels);
  }
  auto layer =
      LayerPlan::unchanged(name, parse(kinds, "kind", in.at("kind").get<std::string>()), in_channels, out_channels);
  if (in.contains("kept_in")) layer.kept_in = integers(in["kept_in"], what + ": kept_in");
  if (in.contains("kept_out")) layer.kept_out = integers(in["kept_out"], what + ": kept_out");
  if (in.contains("gather")) layer.gather = integers(in["gather"], what + ": gather");
  if (in.contains("rank")) layer.rank = integer(in["rank"], what + ": rank");
  if (in.contains("layout")) layer.layout = parse(layouts, "layout", in["layout"].get<std::string>());
  if (in.contains("rank_in")) layer.rank_in = integer(in["rank_in"], what + ": rank_in");
  if (in.contains("mask")) layer.mask = read_mask(in["mask"], what);
  if (in.contains("bits")) layer.bits = integer(in["bits"], what + ": bits");
  return layer;
}

CompressionPlan read_plan(const json& in) {
  TORCH_CHECK_VALUE(in.is_object() && in.contains("cctorch_plan"),
                    "plan: not a cctorch plan, the key 'cctorch_plan' is missing");
  const int64_t version = integer(in["cctorch_plan"], "format version");
  TORCH_CHECK_VALUE(version == format_version, "plan: format version ", version, ", this library reads version ",
                    format_version);
  check_keys(in, "the file", {"cctorch_plan", "method", "target", "layers"});
  CompressionPlan plan;
  in.at("method").get_to(plan.method);
  in.at("target").get_to(plan.target);
  const json& layers = in.at("layers");
  TORCH_CHECK_VALUE(layers.is_array(), "plan: layers is of type ", layers.type_name(), ", expected a list of layers");
  for (const json& layer : layers) plan.layers.push_back(read_layer(layer));
  plan.validate();
  return plan;
}

}  // namespace

std::string CompressionPlan::to_json() const try {
  // One line for each layer: diffs of two plans then show the layers that differ.
  std::string text = fmt::format(R"({{"cctorch_plan": {}, "method": {}, "target": {}, "layers": [)", format_version,
                                 json(method).dump(), json(finite(target, "target")).dump());
  for (size_t i = 0; i < layers.size(); ++i) text += (i ? ",\n  " : "\n  ") + write(layers[i]).dump();
  return text + "\n]}\n";
} catch (const json::exception& error) {
  TORCH_CHECK_VALUE(false, "plan: a name cannot be written as JSON: ", error.what());
}

CompressionPlan CompressionPlan::from_json(std::string_view text) {
  try {
    return read_plan(json::parse(text));
  } catch (const json::exception& error) {
    TORCH_CHECK_VALUE(false, "plan: the JSON is truncated or malformed: ", error.what());
  }
}

}  // namespace cctorch
