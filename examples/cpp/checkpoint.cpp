#include "checkpoint.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/tensor.h>
#include <cctorch/nn/state_dict.h>
#include <fmt/format.h>

#include <charconv>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <system_error>
#include <utility>

#include "files.h"
#include "options.h"

namespace {

// Calls visit(name, member) for each.
template <typename Figures, typename Visit>
void visit_figures(Figures& of, const Visit& visit) {
  visit("nominal_macs", of.nominal_macs);
  visit("final_macs", of.final_macs);
  visit("top1_uncorrected", of.uncorrected);
  visit("top1_reestimated", of.reestimated);
  visit("top1_repaired", of.repaired);
  visit("dense.top1", of.dense.top1);
  visit("dense.latency_1", of.dense.latency_1);
  visit("dense.latency_128", of.dense.latency_128);
  visit("dense.parameters", of.dense.parameters);
  visit("dense.macs", of.dense.macs);
  visit("dense.bytes", of.dense.bytes);
}

template <typename Quantized, typename Visit>
void visit_quantized(Quantized& of, const Visit& visit) {
  visit("top1_finetuned", of.finetuned);
  visit("top1_prepared", of.prepared);
}

void insert(cctorch::Safetensors& archive, const std::string& prefix, const Tensors& tensors) {
  for (const auto& [name, tensor] : tensors) archive.tensors[prefix + name] = tensor;
}

Tensors tensors_of(const cctorch::Safetensors& archive, std::string_view prefix) {
  Tensors found;
  for (const auto& [name, tensor] : archive.tensors) {
    if (name.starts_with(prefix)) found[name.substr(prefix.size())] = tensor;
  }
  return found;
}

cctorch::Safetensors to_archive(const State& state, const std::map<std::string, std::string>& settings) {
  cctorch::Safetensors archive;
  for (const auto& [name, value] : settings) archive.metadata["setting." + name] = value;
  archive.tensors["losses"] = at::tensor(state.losses, at::kDouble);
  if (state.compressed) {
    archive.metadata["plan"] = state.compressed->plan.to_json();
    const auto put = [&](const char* name, const auto& value) { archive.metadata[name] = fmt::format("{}", value); };
    visit_figures(*state.compressed, put);
    if (state.compressed->quantized) visit_quantized(*state.compressed->quantized, put);
  }
  insert(archive, "model.", state.model);
  insert(archive, "momentum.", state.momentum);
  return archive;
}

template <typename Number>
void parse(const std::string& text, Number& number) {
  const char* const end = text.data() + text.size();
  const auto [behind, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || behind != end) throw std::runtime_error(fmt::format("'{}' is no number", text));
}

State state_of(const cctorch::Safetensors& archive) {
  if (!archive.metadata.contains(std::string(cctorch::safetensors_checksum))) throw std::runtime_error("no checksum");
  State state;
  const at::Tensor& losses = archive.tensors.at("losses");
  if (losses.scalar_type() != at::kDouble) throw std::runtime_error("the losses are not float64");
  state.losses.assign(losses.const_data_ptr<double>(), losses.const_data_ptr<double>() + losses.numel());
  if (archive.metadata.contains("plan")) {
    Compressed& compressed = state.compressed.emplace();
    compressed.plan = cctorch::CompressionPlan::from_json(archive.metadata.at("plan"));
    const auto take = [&](const char* name, auto& value) { parse(archive.metadata.at(name), value); };
    visit_figures(compressed, take);
    if (archive.metadata.contains("top1_prepared")) visit_quantized(compressed.quantized.emplace(), take);
  }
  state.model = tensors_of(archive, "model.");
  state.momentum = tensors_of(archive, "momentum.");
  if (state.model.empty()) throw std::runtime_error("there is no network");
  return state;
}

// The name, and the format, that earlier versions gave a checkpoint.
void expect_none_of_before(const std::filesystem::path& file) {
  if (!std::filesystem::exists(file)) return;
  throw std::invalid_argument(
      fmt::format("{}: is a checkpoint of an earlier version of train_resnet: go on with that version, name another "
                  "--out for a new run, or delete that file to start over",
                  file.string()));
}

void expect_settings(const cctorch::Safetensors& archive, const std::map<std::string, std::string>& settings,
                     const std::filesystem::path& file) {
  std::string differences;
  // What an earlier version did not have was as it is by default.
  const std::map<std::string, std::string> defaults = ::settings(Options());
  for (const auto& [name, value] : settings) {
    const auto found = archive.metadata.find("setting." + name);
    const std::string before = found == archive.metadata.end() ? defaults.at(name) : found->second;
    if (before != value)
      differences += fmt::format("{}{} '{}' -> '{}'", differences.empty() ? "" : ", ", name, before, value);
  }
  if (differences.empty()) return;
  throw std::invalid_argument(
      fmt::format("{} is of a run with other options: {}; give the same ones to go on with it, another --out for a new "
                  "run, or delete that file to start over",
                  file.string(), differences));
}

}  // namespace

void State::take(const ResNet& network, torch::optim::SGD& optimizer) {
  model = cctorch::state_dict(*network);
  momentum.clear();
  for (const auto& parameter : network->named_parameters()) {
    const auto found = optimizer.state().find(parameter.value().unsafeGetTensorImpl());
    if (found == optimizer.state().end()) continue;
    momentum[parameter.key()] = static_cast<torch::optim::SGDParamState&>(*found->second).momentum_buffer();
  }
}

void State::restore(ResNet& network, torch::optim::SGD& optimizer) const try {
  if (model.empty()) return;
  cctorch::load_state_dict(*network, model);
  for (const auto& parameter : network->named_parameters()) {
    if (!momentum.contains(parameter.key())) continue;
    auto restored = std::make_unique<torch::optim::SGDParamState>();
    restored->momentum_buffer(at::empty_like(parameter.value()).detach().copy_(momentum.at(parameter.key())));
    optimizer.state()[parameter.value().unsafeGetTensorImpl()] = std::move(restored);
  }
} catch (const c10::Error& error) {
  throw std::runtime_error(
      fmt::format("the checkpoint is of another network: {}: delete it to start over", error.what_without_backtrace()));
}

Checkpoint::Checkpoint(std::filesystem::path file, std::map<std::string, std::string> settings, const Ranks& ranks)
    : file_(std::move(file)), settings_(std::move(settings)), ranks_(ranks) {}

std::optional<State> Checkpoint::load() const {
  std::optional<State> state;
  const std::string bytes = ranks_.on_main([&]() -> std::string {
    if (!std::filesystem::exists(file_)) {
      expect_none_of_before(file_.parent_path() / "checkpoint.pt");
      return "";
    }
    std::string content = read_file(file_);
    cctorch::Safetensors archive;
    try {
      archive = cctorch::from_safetensors(content);
      state = state_of(archive);
    } catch (const std::exception& error) {
      throw std::invalid_argument(
          fmt::format("{}: is damaged, or no checkpoint of train_resnet: delete it to start over", file_.string()));
    }
    expect_settings(archive, settings_, file_);
    return content;
  });
  if (!bytes.empty() && !state) state = state_of(cctorch::from_safetensors(bytes));
  return state;
}

void Checkpoint::save(const State& state) const {
  ranks_.on_main([&] {
    write_file(file_, cctorch::to_safetensors(to_archive(state, settings_)));
    return "";
  });
}
