#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>

// Each in a file of its own, since each needs its own headers.
namespace cctorch::distributed {

using StorePtr = c10::intrusive_ptr<c10d::Store>;
using BackendPtr = c10::intrusive_ptr<c10d::Backend>;

BackendPtr make_gloo(const StorePtr& store, int rank, int ranks, std::chrono::milliseconds timeout);

// Throws c10::Error where this library was built without NCCL.
BackendPtr make_nccl(const StorePtr& store, int rank, int ranks, std::chrono::milliseconds timeout);

}  // namespace cctorch::distributed
