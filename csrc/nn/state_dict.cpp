#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/tensor.h>
#include <cctorch/codes.h>
#include <cctorch/nn/compressible.h>
#include <cctorch/nn/prepare.h>
#include <cctorch/nn/state_dict.h>

#include <string>
#include <utility>
#include <vector>

namespace cctorch {

namespace {

// The tensors that load_state_dict writes into, and the indices, which it only compares.
struct Named {
  Safetensors::Tensors values, indices;
  // The parameters on which a constraint acts, and where its own tensors begin.
  struct Constrained {
    const nn::Constraint* constraint;
    std::string parameter, children;
  };
  std::vector<Constrained> constrained;
};

void collect(const torch::nn::Module& module, const std::string& path, Named& found) {
  const auto* const layer = dynamic_cast<const nn::Compressible*>(&module);
  std::string prefix = path;
  if (layer != nullptr && layer->plan() && !layer->plan()->gather.empty()) {
    found.indices[path + "index"] = at::tensor(layer->plan()->gather, at::kLong);
    prefix += "layer.";
  }
  for (const auto& entry : module.named_parameters(/*recurse=*/false))
    found.values[prefix + entry.key()] = entry.value().detach();
  if (layer != nullptr) {
    for (const nn::Constraint& constraint : layer->constraints())
      found.constrained.push_back({&constraint, prefix + constraint.weight, path + constraint.weight});
  }
  // A module cannot give up the statistics of a normalization of which nothing but the bias is left.
  if (layer == nullptr || !layer->plan() || !layer->plan()->reads_nothing()) {
    for (const auto& entry : module.named_buffers(/*recurse=*/false))
      found.values[prefix + entry.key()] = entry.value();
  }
  for (const auto& child : module.named_children()) collect(*child.value(), path + child.key() + ".", found);
}

Named named_tensors(const torch::nn::Module& model) {
  Named found;
  collect(model, "", found);
  return found;
}

const at::Tensor& find(const std::string& name, const at::Tensor& wanted, const Safetensors::Tensors& state) {
  const auto entry = state.find(name);
  TORCH_CHECK_VALUE(entry != state.end(), "state: '", name,
                    "' of this model is missing: is it the state of the same network, with the same plan applied?");
  const at::Tensor& given = entry->second;
  TORCH_CHECK_VALUE(given.defined() && given.sizes() == wanted.sizes(), "state: '", name, "' has the shape ",
                    given.defined() ? given.sizes() : at::IntArrayRef(), ", expected ", wanted.sizes(),
                    " of this model");
  return given;
}

}  // namespace

Safetensors::Tensors state_dict(const torch::nn::Module& model) {
  Named found = named_tensors(model);
  found.values.merge(found.indices);
  return std::move(found.values);
}

Safetensors::Tensors quantized_state_dict(const torch::nn::Module& model) {
  const at::NoGradGuard no_grad;
  Named found = named_tensors(model);
  found.values.merge(found.indices);
  for (const auto& [constraint, parameter, children] : found.constrained) {
    for (const char* const tensor : {"_mask.mask", "_quant.log_scale"}) found.values.erase(children + tensor);
    at::Tensor& value = found.values.at(parameter);
    value = (*constraint)(value);
    if (!constraint->quant.is_empty())
      encode_weight(found.values, parameter, constraint->quant->scale(), constraint->quant->options.bits());
  }
  return std::move(found.values);
}

void load_state_dict(torch::nn::Module& model, const Safetensors::Tensors& state) {
  const Safetensors::Tensors plain = decode_weights(state);
  Named found = named_tensors(model);
  for (const auto& [name, value] : found.values) find(name, value, plain);
  for (const auto& [name, index] : found.indices) {
    TORCH_CHECK_VALUE(at::equal(find(name, index, plain).cpu().to(at::kLong), index), "state: '", name,
                      "' gathers other channels than this model: was another plan applied to it?");
  }
  for (const auto& [name, value] : plain) {
    TORCH_CHECK_VALUE(found.values.contains(name) || found.indices.contains(name), "state: this model has no '", name,
                      "': is it the state of the same network, with the same plan applied?");
  }
  const at::NoGradGuard no_grad;
  for (auto& [name, value] : found.values) value.copy_(plain.at(name));
}

}  // namespace cctorch
