#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/functorch/DynamicLayer.h>

#include <utility>

namespace cctorch::autograd {

// Whether a transform of torch.func is running.
inline bool is_transforming() {
  return at::functorch::functorchTLSAccessor() && at::functorch::maybeCurrentDynamicLayer().has_value();
}

// Function::apply. Under a transform of torch.func that throws without saying what to do instead.
template <class Function, typename... Arguments>
auto record(Arguments&&... arguments) {
  TORCH_CHECK(
      !is_transforming(),
      "cctorch: torch.func.grad, vjp, jvp and their kin do not differentiate an operator whose derivative is C++; "
      "use Tensor.backward or torch.autograd.grad, of torch.vmap(...) too");
  return Function::apply(std::forward<Arguments>(arguments)...);
}

}  // namespace cctorch::autograd
