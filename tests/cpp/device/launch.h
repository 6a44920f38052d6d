#pragma once

#include "tests/cpp/device/fibers.h"

#include "kernels/block.cuh"

namespace cctorch::device {

// Starts a kernel as kernels/launch.cuh does on a device, and counts.
struct Launch {
  uint32_t seed;
  int* launches = nullptr;

  template <typename Kernel>
  void operator()(int64_t blocks, const Kernel& kernel) const {
    if (launches) ++*launches;
    launch<typename Kernel::Shared>(static_cast<unsigned>(blocks), cuda::kThreads, seed,
                                    [&](typename Kernel::Shared& shared) { kernel(shared); });
  }
};

}  // namespace cctorch::device
