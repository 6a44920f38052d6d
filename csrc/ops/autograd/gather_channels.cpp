#include "csrc/ops/gather_channels.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "csrc/ops/autograd/needs_graph.h"
#include "csrc/ops/autograd/record.h"

// Each is linear, and the other one its derivative.
namespace cctorch::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class Gather : public torch::autograd::Function<Gather> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& index, int64_t dim) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->save_for_backward({index});
    context->saved_data["dim"] = dim;
    context->saved_data["channels"] = x.sym_size(dim);
    return cctorch::gather_channels(x, index, dim);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const at::Tensor index = context->get_saved_variables()[0];
    return {scatter_channels_symint(grads[0], index, context->saved_data["dim"].toInt(),
                                    context->saved_data["channels"].toSymInt()),
            {},
            {}};
  }
};

class Scatter : public torch::autograd::Function<Scatter> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* context, const at::Tensor& y, const at::Tensor& index, int64_t dim,
                            c10::SymInt channels) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    context->save_for_backward({index});
    context->saved_data["dim"] = dim;
    return scatter_channels_symint(y, index, dim, std::move(channels));
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const at::Tensor index = context->get_saved_variables()[0];
    return {cctorch::gather_channels(grads[0], index, context->saved_data["dim"].toInt()), {}, {}, {}};
  }
};

at::Tensor gather_channels(const at::Tensor& x, const at::Tensor& index, int64_t dim) {
  if (needs_graph(x)) return record<Gather>(x, index, check_gather_channels(x, index, dim));
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return cctorch::gather_channels(x, index, dim);
}

at::Tensor scatter_channels(const at::Tensor& y, const at::Tensor& index, int64_t dim, c10::SymInt channels) {
  if (needs_graph(y)) return record<Scatter>(y, index, dim, std::move(channels));
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return scatter_channels_symint(y, index, dim, std::move(channels));
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Autograd, m) {
  m.impl("gather_channels", &gather_channels);
  m.impl("scatter_channels", &scatter_channels);
}

}  // namespace cctorch::autograd
