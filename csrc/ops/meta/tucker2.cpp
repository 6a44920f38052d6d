#include "csrc/ops/tucker2.h"

#include <torch/library.h>

namespace cctorch::meta {
namespace {

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>> tucker2(
    at::TensorList weights, at::IntArrayRef ranks_out, at::IntArrayRef ranks_in, int64_t iterations,
    at::TensorList bases_out, at::TensorList bases_in) {
  check_tucker2(weights, {ranks_out, ranks_in, iterations}, bases_out, bases_in);
  return tucker2_lists(weights.size(), [&](size_t i) { return empty_tucker2(weights[i], ranks_out[i], ranks_in[i]); });
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Meta, m) { m.impl("tucker2", &tucker2); }

}  // namespace cctorch::meta
