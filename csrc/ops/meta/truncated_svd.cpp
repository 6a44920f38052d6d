#include "csrc/ops/truncated_svd.h"

#include <torch/library.h>

namespace cctorch::meta {
namespace {

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> truncated_svd(at::TensorList matrices,
                                                                           at::IntArrayRef ranks,
                                                                           at::TensorList bases) {
  check_truncated_svd(matrices, ranks, bases);
  std::vector<at::Tensor> left, right;
  for (size_t i = 0; i < matrices.size(); ++i) {
    auto factors = empty_factors(matrices[i], ranks[i]);
    left.push_back(std::move(factors.first));
    right.push_back(std::move(factors.second));
  }
  return {left, right};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Meta, m) { m.impl("truncated_svd", &truncated_svd); }

}  // namespace cctorch::meta
