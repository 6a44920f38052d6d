#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <string_view>

// By the names of the parameters and buffers.
using Tensors = std::map<std::string, at::Tensor>;

// What a safetensors file holds (https://huggingface.co/docs/safetensors): any program that knows the format reads it.
// LibTorch's own reader, torch::load, trusts a file's word for the sizes of its tensors, and reads beyond the memory
// that it has for them.
struct Archive {
  Tensors tensors;  // float32, float64 and int64; contiguous, on the CPU, when they are read
  std::map<std::string, std::string> texts;
};

std::string to_safetensors(const Archive& archive);

// Of a file that to_safetensors made. Throws std::runtime_error where one byte is another, or a tensor is not what it
// says it is. Nothing in the file is executed, and no more memory is asked for than the file is long.
Archive from_safetensors(std::string_view file);
