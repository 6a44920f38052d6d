#include <c10/util/Exception.h>
#include <cctorch/plan.h>

#include <fmt/format.h>
#include <array>

#include <nlohmann/json.hpp>
#include <utility>

// The plan's file format, version 1. Index lists that keep everything are left out, so that a plan stays readable.
namespace cctorch {

namespace {

using nlohmann::json;

constexpr int format_version = 1;
constexpr std::array kinds = {LayerKind::conv2d, LayerKind::depthwise_conv2d, LayerKind::linear,
                              LayerKind::batch_norm2d};
constexpr std::array mask_kinds = {MaskPlan::Kind::magnitude, MaskPlan::Kind::nm, MaskPlan::Kind::channel};

template <class Kinds>
typename Kinds::value_type parse_kind(const Kinds& all, const std::string& text) {
  std::string expected;
  for (const auto kind : all) {
    if (to_string(kind) == text) return kind;
    expected += std::string(expected.empty() ? "" : ", ") + std::string(to_string(kind));
  }
  TORCH_CHECK_VALUE(false, "plan: kind '", text, "', expected one of ", expected);
}

json write(const MaskPlan& mask) {
  json out = {{"kind", to_string(mask.kind)}};
  if (mask.kind == MaskPlan::Kind::nm) {
    out["n"] = mask.n;
    out["m"] = mask.m;
  } else {
    out["sparsity"] = mask.sparsity;
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
  if (layer.mask) out["mask"] = write(*layer.mask);
  if (layer.bits) out["bits"] = *layer.bits;
  return out;
}

MaskPlan read_mask(const json& in) {
  MaskPlan mask;
  mask.kind = parse_kind(mask_kinds, in.at("kind").get<std::string>());
  mask.sparsity = in.value("sparsity", mask.sparsity);
  mask.n = in.value("n", mask.n);
  mask.m = in.value("m", mask.m);
  return mask;
}

LayerPlan read_layer(const json& in) {
  const auto in_channels = in.at("in_channels").get<int64_t>();
  const auto out_channels = in.at("out_channels").get<int64_t>();
  const auto name = in.at("name").get<std::string>();
  constexpr int64_t most_channels = int64_t{1} << 24;  // a damaged file must not ask for terabytes
  for (const int64_t channels : {in_channels, out_channels}) {
    TORCH_CHECK_VALUE(channels > 0 && channels <= most_channels, "plan: layer '", name, "' has ", channels,
                      " channels, expected 1 to ", most_channels);
  }
  auto layer =
      LayerPlan::unchanged(name, parse_kind(kinds, in.at("kind").get<std::string>()), in_channels, out_channels);
  if (in.contains("kept_in")) in["kept_in"].get_to(layer.kept_in);
  if (in.contains("kept_out")) in["kept_out"].get_to(layer.kept_out);
  if (in.contains("gather")) in["gather"].get_to(layer.gather);
  if (in.contains("rank")) layer.rank = in["rank"].get<int64_t>();
  if (in.contains("mask")) layer.mask = read_mask(in["mask"]);
  if (in.contains("bits")) layer.bits = in["bits"].get<int64_t>();
  return layer;
}

CompressionPlan read_plan(const json& in) {
  TORCH_CHECK_VALUE(in.is_object() && in.contains("cctorch_plan"),
                    "plan: not a cctorch plan, the key 'cctorch_plan' is missing");
  const int version = in["cctorch_plan"].get<int>();
  TORCH_CHECK_VALUE(version == format_version, "plan: format version ", version, ", this library reads version ",
                    format_version);
  CompressionPlan plan;
  in.at("method").get_to(plan.method);
  in.at("target").get_to(plan.target);
  for (const json& layer : in.at("layers")) plan.layers.push_back(read_layer(layer));
  plan.validate();
  return plan;
}

}  // namespace

std::string CompressionPlan::to_json() const {
  // One line for each layer: diffs of two plans then show the layers that differ.
  std::string text = fmt::format(R"({{"cctorch_plan": {}, "method": {}, "target": {}, "layers": [)", format_version,
                                 json(method).dump(), json(target).dump());
  for (size_t i = 0; i < layers.size(); ++i) text += (i ? ",\n  " : "\n  ") + write(layers[i]).dump();
  return text + "\n]}\n";
}

CompressionPlan CompressionPlan::from_json(std::string_view text) {
  try {
    return read_plan(json::parse(text));
  } catch (const json::exception& error) {
    TORCH_CHECK_VALUE(false, "plan: the JSON is truncated or malformed: ", error.what());
  }
}

}  // namespace cctorch
