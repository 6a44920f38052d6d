#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <vector>

#include "csrc/ops/checks.h"

namespace cctorch::meta {

inline std::vector<at::Tensor> empty_list_like(at::TensorList tensors) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& tensor : tensors) result.push_back(at::empty_like(tensor));
  return result;
}

inline std::vector<at::Tensor> empty_parameters_like(at::TensorList tensors) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& tensor : tensors) result.push_back(at::empty_like(tensor, at::MemoryFormat::Contiguous));
  return result;
}

// Of an operator on lists, where no tensor names a backend of ours: the Meta kernel, which checks the rest of the
// arguments, for a list without tensors.
template <auto kMeta>
struct WithoutTensors;

template <typename Result, typename... Rest, Result (*kMeta)(at::TensorList, Rest...)>
struct WithoutTensors<kMeta> {
  static Result call(at::TensorList x, Rest... rest) {
    TORCH_CHECK(x.empty(), "x[0] must be on cpu or cuda, got ", x[0].device(), "; move the tensors to one of them");
    return kMeta(x, rest...);
  }
};

}  // namespace cctorch::meta
