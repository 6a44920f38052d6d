#pragma once

#include <ATen/core/Tensor.h>

namespace cctorch {

// y[n, c, ...] = x[n, c, ...] * gate[c]. The gradient of gate[c] is the sum of grad * x over channel c: at gate = 1 it
// is the first-order Taylor importance of the channel (Molchanov et al. 2019).
at::Tensor channel_gate(const at::Tensor& x, const at::Tensor& gate);

}  // namespace cctorch
