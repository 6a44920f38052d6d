#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include "csrc/distributed/backends.h"

namespace cctorch::distributed {

BackendPtr make_gloo(const StorePtr& store, int rank, int ranks, std::chrono::milliseconds timeout) {
  const auto options = c10d::ProcessGroupGloo::Options::create(timeout);
  options->devices.push_back(c10d::ProcessGroupGloo::createDefaultDevice());
  return c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, ranks, options);
}

}  // namespace cctorch::distributed
