#include "network_state.h"

#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <stdexcept>

Tensors state_of(const torch::nn::Module& module) {
  Tensors tensors;
  for (const auto& parameter : module.named_parameters()) tensors[parameter.key()] = parameter.value();
  for (const auto& buffer : module.named_buffers()) tensors[buffer.key()] = buffer.value();
  return tensors;
}

void load_state(torch::nn::Module& module, const Tensors& state) {
  for (const auto& [name, tensor] : state_of(module)) fill(name, tensor, state);
}

void fill(const std::string& name, at::Tensor tensor, const Tensors& from) {
  const auto found = from.find(name);
  if (found == from.end()) throw std::runtime_error(fmt::format("'{}' of this network is missing", name));
  if (found->second.sizes() != tensor.sizes()) {
    throw std::runtime_error(fmt::format("'{}' has the shape {}, expected {} of this network", name,
                                         c10::str(found->second.sizes()), c10::str(tensor.sizes())));
  }
  const at::NoGradGuard no_grad;
  tensor.copy_(found->second);
}
