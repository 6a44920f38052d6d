#include "csrc/ops/fake_quant_weights.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace cctorch::meta {
namespace {

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> fake_quant_weights(at::TensorList weights, int64_t bits,
                                                                                int64_t axis) {
  check_fake_quant_weights(weights, bits, axis);
  std::vector<at::Tensor> quantized, scales;
  for (const at::Tensor& weight : weights) {
    quantized.push_back(at::empty_like(weight));
    scales.push_back(empty_scales(weight, axis));
  }
  return {quantized, scales};
}

// A list without tensors names no backend, and so comes here.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> without_backend(at::TensorList weights, int64_t bits,
                                                                             int64_t axis) {
  check_fake_quant_weights(weights, bits, axis);
  TORCH_CHECK(weights.empty(), "fake_quant_weights: weights[0] must be on cpu or cuda, got ", weights[0].device(),
              "; move the weights to one of them");
  return {};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Meta, m) { m.impl("fake_quant_weights", &fake_quant_weights); }
TORCH_LIBRARY_IMPL(cctorch, CompositeExplicitAutograd, m) { m.impl("fake_quant_weights", &without_backend); }

}  // namespace cctorch::meta
