#include "csrc/ops/float_quant.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "csrc/ops/autograd/recorded.h"
#include "csrc/ops/autograd/straight_through.h"

namespace cctorch::autograd {

TORCH_LIBRARY_IMPL(cctorch, Autograd, m) {
  m.impl("fp8_quant", &Recorded<overload<Fp8QuantOp>(&fp8_quant), &fp8_quant_backward>::call);
  m.impl("fp8_quant.list", &Recorded<overload<Fp8QuantListOp>(&fp8_quant), &fp8_quant_list_backward>::call);
  m.impl("fp8_quant_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("fp8_quant_backward.list", torch::autograd::autogradNotImplementedFallback());
  m.impl("power_of_two_quant", &StraightThrough<overload<PowerOfTwoQuantOp>(&power_of_two_quant)>::call);
  m.impl("power_of_two_quant.list", &StraightThrough<overload<PowerOfTwoQuantListOp>(&power_of_two_quant)>::call);
}

}  // namespace cctorch::autograd
