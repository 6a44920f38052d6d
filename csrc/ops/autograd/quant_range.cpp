#include "csrc/ops/quant_range.h"

#include <torch/library.h>

#include "csrc/ops/autograd/straight_through.h"

namespace cctorch::autograd {

TORCH_LIBRARY_IMPL(cctorch, Autograd, m) {
  m.impl("quant_range", &Constant<&quant_range>::call);
  m.impl("quant_range_offset", &Constant<&quant_range_offset>::call);
  m.impl("observe_range_", &Constant<&observe_range_>::call);
}

}  // namespace cctorch::autograd
