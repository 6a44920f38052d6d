#pragma once

#include <cctorch/safetensors.h>
#include <torch/nn/module.h>

#include <string>

using Tensors = cctorch::Safetensors::Tensors;  // by the names of the parameters and buffers

// The values of the parameters and buffers, not copies of them.
Tensors state_of(const torch::nn::Module& module);

// Into a module of the same shape. Throws as `fill` does.
void load_state(torch::nn::Module& module, const Tensors& state);

// The one of that name into `tensor`. Throws std::runtime_error naming it where it is missing or of another shape.
void fill(const std::string& name, at::Tensor tensor, const Tensors& from);
