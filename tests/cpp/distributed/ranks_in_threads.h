#pragma once

#include <cctorch/distributed.h>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <chrono>
#include <exception>
#include <functional>
#include <thread>
#include <vector>

#include "csrc/distributed/backends.h"

namespace cctorch::distributed {

// `body` on each of `count` ranks, which are threads of this process and talk through Gloo. Throws what the first
// throws.
inline void on_ranks(int count, const std::function<void(const Ranks&)>& body) {
  const auto store = c10::make_intrusive<c10d::HashStore>();
  std::vector<std::exception_ptr> errors(count);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < count; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        const auto group = c10::make_intrusive<c10d::ProcessGroup>(store, rank, count);
        using Type = c10d::ProcessGroup::BackendType;
        group->setDefaultBackend(Type::GLOO);
        group->setBackend(at::kCPU, Type::GLOO, make_gloo(store, rank, count, std::chrono::seconds(20)));
        body(Ranks(group));
      } catch (...) {
        errors[rank] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace cctorch::distributed
