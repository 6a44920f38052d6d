#include "csrc/ops/mask.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "csrc/ops/autograd/needs_graph.h"

namespace cctorch::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class ApplyMask : public torch::autograd::Function<ApplyMask> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext*, const at::Tensor& weight, const at::Tensor& mask) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return apply_mask(weight, mask);
  }

  static variable_list backward(AutogradContext*, const variable_list& grads) { return {grads[0], {}}; }
};

at::Tensor straight_through(const at::Tensor& weight, const at::Tensor& mask) {
  if (!needs_graph(weight)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return apply_mask(weight, mask);
  }
  return ApplyMask::apply(weight, mask);
}

class MagnitudePrune : public torch::autograd::Function<MagnitudePrune> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext*, at::TensorList weights, double sparsity) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return magnitude_prune(weights, sparsity);
  }

  static variable_list backward(AutogradContext*, variable_list grads) {
    grads.emplace_back();  // of the sparsity
    return grads;
  }
};

std::vector<at::Tensor> straight_through_prune(at::TensorList weights, double sparsity) {
  if (std::none_of(weights.begin(), weights.end(), [](const at::Tensor& weight) { return needs_graph(weight); })) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return magnitude_prune(weights, sparsity);
  }
  return MagnitudePrune::apply(weights, sparsity);
}

// Masks are constants: they are made below autograd, so that none records a graph.
std::vector<at::Tensor> constant_magnitude_masks(at::TensorList weights, double sparsity) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return magnitude_masks(weights, sparsity);
}

std::vector<at::Tensor> constant_nm_masks(at::TensorList weights, int64_t n, int64_t m, int64_t axis) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return nm_masks(weights, n, m, axis);
}

std::vector<at::Tensor> constant_channel_masks(at::TensorList weights, double sparsity, int64_t axis) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return channel_masks(weights, sparsity, axis);
}

std::vector<at::Tensor> constant_block_masks(at::TensorList weights, double sparsity, int64_t rows, int64_t columns) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return block_masks(weights, sparsity, rows, columns);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Autograd, m) {
  m.impl("apply_mask", &straight_through);
  m.impl("magnitude_prune", &straight_through_prune);
  m.impl("magnitude_masks", &constant_magnitude_masks);
  m.impl("nm_masks", &constant_nm_masks);
  m.impl("channel_masks", &constant_channel_masks);
  m.impl("block_masks", &constant_block_masks);
}

}  // namespace cctorch::autograd
