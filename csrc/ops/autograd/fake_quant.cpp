#include "csrc/ops/fake_quant.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "csrc/ops/autograd/recorded.h"

namespace cctorch::autograd {

TORCH_LIBRARY_IMPL(cctorch, Autograd, m) {
  m.impl("fake_quant", &Recorded<overload<FakeQuantOp>(&fake_quant), &fake_quant_backward>::call);
  m.impl("fake_quant_offset",
         &Recorded<overload<FakeQuantOffsetOp>(&fake_quant_offset), &fake_quant_offset_backward>::call);
  m.impl("pact", &Recorded<&pact, &pact_backward>::call);
  m.impl("fake_quant.list", &Recorded<overload<FakeQuantListOp>(&fake_quant), &fake_quant_list_backward>::call);
  m.impl("fake_quant_offset.list",
         &Recorded<overload<FakeQuantOffsetListOp>(&fake_quant_offset), &fake_quant_offset_list_backward>::call);
  for (const char* name : {"fake_quant_backward", "fake_quant_offset_backward", "pact_backward",
                           "fake_quant_backward.list", "fake_quant_offset_backward.list"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace cctorch::autograd
