#include "csrc/ops/soft_threshold.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "csrc/ops/autograd/recorded.h"

namespace cctorch::autograd {

TORCH_LIBRARY_IMPL(cctorch, Autograd, m) {
  m.impl("soft_threshold", &Recorded<overload<SoftThresholdOp>(&soft_threshold), &soft_threshold_backward>::call);
  m.impl("soft_threshold.list",
         &Recorded<overload<SoftThresholdListOp>(&soft_threshold), &soft_threshold_list_backward>::call);
  m.impl("soft_threshold_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("soft_threshold_backward.list", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace cctorch::autograd
