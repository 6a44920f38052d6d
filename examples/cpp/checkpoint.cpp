#include "checkpoint.h"

#include <ATen/core/Dict.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/tensor.h>
#include <fmt/format.h>
#include <torch/serialize.h>

#include <memory>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "files.h"

namespace {

using Dict = c10::Dict<c10::IValue, c10::IValue>;

// Calls visit(name, member) for each.
template <typename Figures, typename Visit>
void visit_figures(Figures& of, const Visit& visit) {
  visit("nominal_macs", of.nominal_macs);
  visit("final_macs", of.final_macs);
  visit("top1_uncorrected", of.uncorrected);
  visit("top1_reestimated", of.reestimated);
  visit("dense.top1", of.dense.top1);
  visit("dense.latency_1", of.dense.latency_1);
  visit("dense.latency_128", of.dense.latency_128);
  visit("dense.parameters", of.dense.parameters);
  visit("dense.macs", of.dense.macs);
  visit("dense.bytes", of.dense.bytes);
}

void insert(Dict& content, const std::string& prefix, const Tensors& tensors) {
  for (const auto& [name, tensor] : tensors) content.insert(prefix + name, tensor.detach().cpu());
}

Tensors tensors_of(const Dict& content, std::string_view prefix) {
  Tensors found;
  for (const auto& entry : content) {
    const std::string& name = entry.key().toStringRef();
    if (name.starts_with(prefix)) found[name.substr(prefix.size())] = entry.value().toTensor();
  }
  return found;
}

std::string to_bytes(const State& state, const std::map<std::string, std::string>& settings) {
  Dict content(c10::StringType::get(), c10::AnyType::get());
  for (const auto& [name, value] : settings) content.insert("setting." + name, value);
  content.insert("losses", at::tensor(state.losses, at::kDouble));
  if (state.compressed) {
    content.insert("plan", state.compressed->plan.to_json());
    visit_figures(*state.compressed, [&](const char* name, const auto& value) { content.insert(name, value); });
  }
  insert(content, "model.", state.model);
  insert(content, "momentum.", state.momentum);
  const std::vector<char> bytes = torch::pickle_save(content);
  return {bytes.begin(), bytes.end()};
}

Dict parsed(const std::string& bytes) { return torch::pickle_load({bytes.begin(), bytes.end()}).toGenericDict(); }

State state_of(const Dict& content) {
  State state;
  const at::Tensor losses = content.at("losses").toTensor();
  state.losses.assign(losses.const_data_ptr<double>(), losses.const_data_ptr<double>() + losses.numel());
  if (content.contains("plan")) {
    Compressed& compressed = state.compressed.emplace();
    compressed.plan = cctorch::CompressionPlan::from_json(content.at("plan").toStringRef());
    visit_figures(compressed, [&](const char* name, auto& value) {
      value = content.at(name).to<std::remove_reference_t<decltype(value)>>();
    });
  }
  state.model = tensors_of(content, "model.");
  state.momentum = tensors_of(content, "momentum.");
  return state;
}

void expect_settings(const Dict& content, const std::map<std::string, std::string>& settings,
                     const std::filesystem::path& file) {
  std::string differences;
  for (const auto& [name, value] : settings) {
    const std::string key = "setting." + name;
    const std::string before = content.contains(key) ? content.at(key).toStringRef() : "";
    if (before != value)
      differences += fmt::format("{}{} '{}' -> '{}'", differences.empty() ? "" : ", ", name, before, value);
  }
  if (differences.empty()) return;
  throw std::invalid_argument(
      fmt::format("{} is of a run with other options: {}; give the same ones to go on with it, another --out for a new "
                  "run, or delete that file to start over",
                  file.string(), differences));
}

void fill(const std::string& name, at::Tensor tensor, const Tensors& from) {
  const auto found = from.find(name);
  if (found == from.end() || found->second.sizes() != tensor.sizes()) {
    throw std::runtime_error(
        fmt::format("checkpoint: '{}' is not that of this network: delete the file to start over", name));
  }
  tensor.copy_(found->second);
}

Tensors named_state(const ResNet& network) {
  Tensors tensors;
  for (const auto& parameter : network->named_parameters()) tensors[parameter.key()] = parameter.value();
  for (const auto& buffer : network->named_buffers()) tensors[buffer.key()] = buffer.value();
  return tensors;
}

}  // namespace

void State::take(const ResNet& network, torch::optim::SGD& optimizer) {
  model = named_state(network);
  momentum.clear();
  for (const auto& parameter : network->named_parameters()) {
    const auto found = optimizer.state().find(parameter.value().unsafeGetTensorImpl());
    if (found == optimizer.state().end()) continue;
    momentum[parameter.key()] = static_cast<torch::optim::SGDParamState&>(*found->second).momentum_buffer();
  }
}

void State::restore(ResNet& network, torch::optim::SGD& optimizer) const {
  if (model.empty()) return;
  const at::NoGradGuard no_grad;
  for (const auto& [name, tensor] : named_state(network)) fill(name, tensor, model);
  for (const auto& parameter : network->named_parameters()) {
    if (!momentum.contains(parameter.key())) continue;
    auto restored = std::make_unique<torch::optim::SGDParamState>();
    restored->momentum_buffer(at::empty_like(parameter.value()));
    fill(parameter.key(), restored->momentum_buffer(), momentum);
    optimizer.state()[parameter.value().unsafeGetTensorImpl()] = std::move(restored);
  }
}

Checkpoint::Checkpoint(std::filesystem::path file, std::map<std::string, std::string> settings, const Ranks& ranks)
    : file_(std::move(file)), settings_(std::move(settings)), ranks_(ranks) {}

std::optional<State> Checkpoint::load() const {
  std::optional<State> state;
  const std::string bytes = ranks_.on_main([&]() -> std::string {
    if (!std::filesystem::exists(file_)) return "";
    std::string content = read_file(file_);
    std::optional<Dict> found;
    try {
      found = parsed(content);
      state = state_of(*found);
    } catch (const std::exception& error) {
      throw std::invalid_argument(
          fmt::format("{}: is damaged, or no checkpoint of train_resnet: delete it to start over", file_.string()));
    }
    expect_settings(*found, settings_, file_);
    return content;
  });
  if (!bytes.empty() && !state) state = state_of(parsed(bytes));
  return state;
}

void Checkpoint::save(const State& state) const {
  ranks_.on_main([&] {
    write_file(file_, to_bytes(state, settings_));
    return "";
  });
}
