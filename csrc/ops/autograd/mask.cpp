#include "csrc/ops/mask.h"

#include <torch/library.h>

#include "csrc/ops/autograd/straight_through.h"

namespace cctorch::autograd {

TORCH_LIBRARY_IMPL(cctorch, Autograd, m) {
  m.impl("apply_mask", &StraightThrough<&apply_mask>::call);
  m.impl("magnitude_prune", &StraightThrough<&magnitude_prune>::call);
  m.impl("magnitude_masks", &Constant<&magnitude_masks>::call);
  m.impl("nm_masks", &Constant<&nm_masks>::call);
  m.impl("channel_masks", &Constant<&channel_masks>::call);
  m.impl("block_masks", &Constant<&block_masks>::call);
}

}  // namespace cctorch::autograd
