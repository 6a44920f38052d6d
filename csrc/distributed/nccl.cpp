#include "csrc/distributed/backends.h"

// Set by CMake, where there are the headers of CUDA and NCCL.
#ifdef USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

namespace cctorch::distributed {

#ifdef USE_C10D_NCCL

BackendPtr make_nccl(const StorePtr& store, int rank, int ranks, std::chrono::milliseconds timeout) {
  const auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  return c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, ranks, options);
}

#else

BackendPtr make_nccl(const StorePtr&, int, int, std::chrono::milliseconds) {
  TORCH_CHECK_NOT_IMPLEMENTED(false,
                              "device: cuda with several ranks, but this cctorch was built without the headers of CUDA "
                              "or NCCL; expected cpu, or a build with CCTORCH_CUDA=ON beside pip's nvidia-nccl");
}

#endif

}  // namespace cctorch::distributed
