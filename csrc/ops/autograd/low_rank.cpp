#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "csrc/ops/truncated_svd.h"
#include "csrc/ops/tucker2.h"

// The bases are any of many: what is differentiable is the weight that they approximate, so no gradient goes through.
namespace cctorch::autograd {
namespace {

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> truncated_svd(at::TensorList matrices,
                                                                           at::IntArrayRef ranks,
                                                                           at::TensorList bases) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return cctorch::truncated_svd(matrices, ranks, bases);
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>> tucker2(
    at::TensorList weights, at::IntArrayRef ranks_out, at::IntArrayRef ranks_in, int64_t iterations,
    at::TensorList bases_out, at::TensorList bases_in) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return cctorch::tucker2(weights, ranks_out, ranks_in, iterations, bases_out, bases_in);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Autograd, m) {
  m.impl("truncated_svd", &truncated_svd);
  m.impl("tucker2", &tucker2);
}

}  // namespace cctorch::autograd
