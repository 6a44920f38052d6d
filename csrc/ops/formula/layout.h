#pragma once

#include <cstdint>

#include "csrc/ops/formula/host_device.h"

namespace cctorch {

CCTORCH_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

namespace channelwise {

// What a dense tensor with one parameter per channel is in memory order: outer x channels x inner.
struct Layout {
  int64_t outer;
  int64_t channels;
  int64_t inner;
};

}  // namespace channelwise
}  // namespace cctorch
