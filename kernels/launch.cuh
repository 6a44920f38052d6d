#pragma once

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/block.cuh"

namespace cctorch::cuda {

// Blocks that a multiprocessor has registers for, where the kernel does not ask for more: left to itself the compiler
// spills registers so that more fit.
template <typename Kernel>
constexpr unsigned least_blocks() {
  if constexpr (requires { Kernel::kLeastBlocks; }) {
    return Kernel::kLeastBlocks;
  } else {
    return 2;
  }
}

template <typename Kernel>
__global__ void __launch_bounds__(kThreads, least_blocks<Kernel>()) run(const __grid_constant__ Kernel kernel) {
  __shared__ typename Kernel::Shared shared;
  kernel(shared);
}

// Starts a kernel on the current stream: an object with its arguments, the type of its shared memory, and its body.
struct Launch {
  template <typename Kernel>
  void operator()(int64_t blocks, const Kernel& kernel) const {
    run<<<static_cast<unsigned>(blocks), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(kernel);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

// So many for each multiprocessor of the current device.
inline int64_t blocks_on_device(int64_t per_multiprocessor) {
  return per_multiprocessor * at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
}

// Blocks that fill the current device; more of them only leave more parts to put together.
inline int64_t enough_blocks() { return blocks_on_device(2048 / kThreads); }

}  // namespace cctorch::cuda
