#include "csrc/ops/rows.h"

#include <ATen/ops/empty_like.h>

namespace cctorch {

at::Tensor like(const at::Tensor& x, const at::Tensor& rows, std::optional<int64_t> axis) {
  const at::Tensor result = at::empty_like(x);
  if (!axis) return result.copy_(rows.reshape(x.sizes()));
  return result.copy_(rows.reshape(x.movedim(*axis, 0).sizes()).movedim(0, *axis));
}

}  // namespace cctorch
