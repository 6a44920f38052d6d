#pragma once

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/block.cuh"

namespace cctorch::cuda {

// On a multiprocessor: left to itself the compiler spills registers so that more fit.
constexpr unsigned kLeastBlocks = 2;

template <typename Kernel>
__global__ void __launch_bounds__(kThreads, kLeastBlocks) run(const __grid_constant__ Kernel kernel) {
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

// Blocks that fill the current device; more of them only leave more parts to put together.
inline int64_t enough_blocks() {
  constexpr int64_t kPerMultiprocessor = 2048 / kThreads;
  return kPerMultiprocessor * at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
}

}  // namespace cctorch::cuda
