#include "csrc/ops/mask.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

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

// Masks are constants: they are made below autograd, so that none records a graph.
std::vector<at::Tensor> constant_magnitude_masks(at::TensorList weights, double sparsity) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return magnitude_masks(weights, sparsity);
}

at::Tensor constant_nm_mask(const at::Tensor& weight, int64_t n, int64_t m, int64_t axis) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return nm_mask(weight, n, m, axis);
}

at::Tensor constant_channel_mask(const at::Tensor& weight, double sparsity, int64_t axis) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return channel_mask(weight, sparsity, axis);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Autograd, m) {
  m.impl("apply_mask", &straight_through);
  m.impl("magnitude_masks", &constant_magnitude_masks);
  m.impl("nm_mask", &constant_nm_mask);
  m.impl("channel_mask", &constant_channel_mask);
}

}  // namespace cctorch::autograd
