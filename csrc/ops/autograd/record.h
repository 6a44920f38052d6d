#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/functorch/DynamicLayer.h>

#include <utility>

namespace cctorch::autograd {

// Function::apply. Under a transform of torch.func that throws without saying what to do instead.
template <class Function, typename... Arguments>
auto record(Arguments&&... arguments) {
  TORCH_CHECK(
      !at::functorch::functorchTLSAccessor() || !at::functorch::maybeCurrentDynamicLayer(),
      "cctorch: torch.func.grad, vjp, jvp and their kin do not differentiate an operator whose derivative is C++; "
      "use Tensor.backward or torch.autograd.grad, of torch.vmap(...) too");
  return Function::apply(std::forward<Arguments>(arguments)...);
}

}  // namespace cctorch::autograd
