#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <string_view>

namespace cctorch {

// What a safetensors file holds (https://huggingface.co/docs/safetensors): tensors and texts by name, nothing that
// could be executed. `cctorch run` writes its networks so, and Python's safetensors package reads what is written here.
// LibTorch's own reader, torch::load, trusts a file's word for the sizes of its tensors, and reads beyond the memory
// that it has for them.
struct Safetensors {
  using Tensors = std::map<std::string, at::Tensor>;

  // Of float64, 32, 16, bfloat16, int64, 32, 16, 8, uint8 or bool; contiguous and on the CPU when they are read.
  Tensors tensors;
  std::map<std::string, std::string> metadata;
};

// In the metadata of every file that to_safetensors makes: FNV-1a of all bytes but these digits. It finds damage, not
// intent.
inline constexpr std::string_view safetensors_checksum = "cctorch_checksum";

// The bytes of a file. Throws c10::ValueError for a tensor of another type, or a name that is not UTF-8.
std::string to_safetensors(const Safetensors& content);

// The content of a file by anybody. Throws c10::ValueError where it is no safetensors file, where a tensor is not what
// its header says, and where the bytes are not those of the checksum, if there is one. No more memory is asked for than
// the file is long.
Safetensors from_safetensors(std::string_view file);

}  // namespace cctorch
