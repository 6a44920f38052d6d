#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/util/intrusive_ptr.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace c10d {
class ProcessGroup;
class Reducer;
}  // namespace c10d

namespace torch::nn {
class Module;
}

// Data parallel: processes ("ranks") that each work on their share of every batch.
namespace cctorch::distributed {

// Which process of how many this one is, and what goes over all of them. Every rank has to make the same calls, in the
// same order. One that is alone does nothing. Where another rank is gone, or does not answer, Gloo's or NCCL's
// exception is thrown; what ends a rank thus ends all of them.
class Ranks {
 public:
  Ranks() = default;  // alone
  explicit Ranks(c10::intrusive_ptr<c10d::ProcessGroup> group);

  // The processes of the environment variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as `torchrun --no-python`
  // sets them; alone where there is no WORLD_SIZE. Gloo, and with a `device` of type CUDA also NCCL.
  // Throws c10::Error for a variable that is missing or no number, and where the others do not come before `timeout`.
  static Ranks from_environment(const at::Device& device, std::chrono::seconds timeout = std::chrono::minutes(30));

  int64_t rank() const;
  int64_t count() const;
  bool is_main() const { return rank() == 0; }

  // Where this rank's slice of `items` begins, and how many they are; slices are about equally long, some may be empty.
  std::pair<int64_t, int64_t> slice(int64_t items) const;

  // Adds up over the ranks, in place: the same bits everywhere.
  void sum_(at::Tensor tensor) const;

  // Every rank's `tensor`, all of one shape: ranks x shape.
  at::Tensor gather(const at::Tensor& tensor) const;

  // Rank 0's, in place.
  void broadcast_(at::Tensor tensor) const;

  // What `function` returns on rank 0. What it throws there, every rank throws: as c10::Error on the others.
  std::string on_main(const std::function<std::string()>& function) const;

  const c10::intrusive_ptr<c10d::ProcessGroup>& group() const;

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

// Parameters and buffers of rank 0, for every rank.
void broadcast_state(torch::nn::Module& model, const Ranks& ranks);

// Compares parameters and buffers between the ranks, by hashes. Throws c10::Error, on every rank, naming `what`, the
// first tensor that differs and the ranks that differ from rank 0.
void assert_identical(std::string_view what, const torch::nn::Module& model, const Ranks& ranks);

// Backward passes whose gradients are those of the whole batch, on every rank: c10d::Reducer, which adds up in buckets
// while the rest of the pass still runs. Starts from rank 0's parameters and buffers. To be made anew once the model
// has other parameters, as after cctorch::apply, when the one before is gone. Every parameter has to be part of the
// loss.
class DataParallel {
 public:
  DataParallel(torch::nn::Module& model, const Ranks& ranks);
  ~DataParallel();
  DataParallel(const DataParallel&) = delete;
  DataParallel& operator=(const DataParallel&) = delete;

  // `loss`: mean over this rank's examples, which are the fraction `share` of the batch. A rank without any passes
  // something like outputs.sum() with a share of 0.
  void backward(const at::Tensor& loss, double share = 1.0);

 private:
  int64_t ranks_;
  std::unique_ptr<c10d::Reducer> reducer_;
};

}  // namespace cctorch::distributed
