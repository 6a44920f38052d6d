#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <cctorch/distributed.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>

#include "csrc/distributed/backends.h"

namespace cctorch::distributed {
namespace {

std::string variable(const char* name) {
  const char* const value = std::getenv(name);
  TORCH_CHECK_VALUE(value != nullptr, "environment: WORLD_SIZE is set, but not ", name,
                    "; expected RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun --no-python sets them");
  return value;
}

int number(const char* name, int least, int most) {
  const std::string text = variable(name);
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  TORCH_CHECK_VALUE(error == std::errc() && end == text.data() + text.size() && value >= least && value <= most,
                    "environment: ", name, " = '", text, "', expected a number from ", least, " to ", most);
  return value;
}

// Under torchrun the store is the agent's: rank 0 is a client of it like the others, and a restart has to have keys of
// its own.
StorePtr make_store(int rank, int ranks, std::chrono::milliseconds timeout) {
  const char* const agent = std::getenv("TORCHELASTIC_USE_AGENT_STORE");
  const bool has_agent = agent != nullptr && std::string_view(agent) == "True";
  const char* const restarts = std::getenv("TORCHELASTIC_RESTART_COUNT");
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(number("MASTER_PORT", 1, std::numeric_limits<uint16_t>::max()));
  options.isServer = rank == 0 && !has_agent;
  if (!has_agent) options.numWorkers = ranks;
  options.timeout = timeout;
  auto store = c10::make_intrusive<c10d::TCPStore>(variable("MASTER_ADDR"), options);
  return c10::make_intrusive<c10d::PrefixStore>(std::string("cctorch/") + (restarts ? restarts : "0"),
                                                std::move(store));
}

// A result or an error's text, as bytes.
at::Tensor to_bytes(const std::string& text, bool failed) {
  at::Tensor bytes = at::empty({static_cast<int64_t>(text.size()) + 1}, at::kByte);
  std::memcpy(bytes.data_ptr(), text.data(), text.size());
  bytes.data_ptr<uint8_t>()[text.size()] = failed ? 1 : 0;
  return bytes;
}

}  // namespace

struct Ranks::State {
  c10::intrusive_ptr<c10d::ProcessGroup> group;
};

Ranks::Ranks(c10::intrusive_ptr<c10d::ProcessGroup> group)
    : state_(std::make_shared<const State>(State{std::move(group)})) {}

Ranks Ranks::from_environment(const at::Device& device, std::chrono::seconds timeout) {
  if (std::getenv("WORLD_SIZE") == nullptr) return {};
  const int ranks = number("WORLD_SIZE", 1, std::numeric_limits<int>::max());
  const int rank = number("RANK", 0, ranks - 1);
  if (ranks == 1) return {};
  const StorePtr store = make_store(rank, ranks, timeout);
  auto group = c10::make_intrusive<c10d::ProcessGroup>(store, rank, ranks);
  using Type = c10d::ProcessGroup::BackendType;
  const auto own = [&](const char* name) { return c10::make_intrusive<c10d::PrefixStore>(name, store); };
  group->setDefaultBackend(device.is_cuda() ? Type::NCCL : Type::GLOO);
  group->setBackend(at::kCPU, Type::GLOO, make_gloo(own("gloo"), rank, ranks, timeout));
  if (device.is_cuda()) group->setBackend(at::kCUDA, Type::NCCL, make_nccl(own("nccl"), rank, ranks, timeout));
  group->setGroupName("cctorch");
  return Ranks(std::move(group));
}

int64_t Ranks::rank() const { return state_ ? state_->group->getRank() : 0; }

int64_t Ranks::count() const { return state_ ? state_->group->getSize() : 1; }

const c10::intrusive_ptr<c10d::ProcessGroup>& Ranks::group() const {
  TORCH_CHECK(state_, "group: a process alone has none");
  return state_->group;
}

std::pair<int64_t, int64_t> Ranks::slice(int64_t items) const {
  const int64_t begin = items * rank() / count(), end = items * (rank() + 1) / count();
  return {begin, end - begin};
}

void Ranks::sum_(at::Tensor tensor) const {
  if (count() == 1) return;
  std::vector<at::Tensor> tensors = {std::move(tensor)};
  group()->allreduce(tensors)->wait();
}

at::Tensor Ranks::gather(const at::Tensor& tensor) const {
  if (count() == 1) return tensor.unsqueeze(0);
  std::vector<at::Tensor> inputs = {tensor.contiguous()};
  std::vector<std::vector<at::Tensor>> outputs(1);
  for (int64_t i = 0; i < count(); ++i) outputs[0].push_back(at::empty_like(inputs[0]));
  group()->allgather(outputs, inputs)->wait();
  return at::stack(outputs[0]);
}

void Ranks::broadcast_(at::Tensor tensor) const {
  if (count() == 1) return;
  // Gloo and NCCL send memory as it lies, and its order may differ between ranks.
  at::Tensor flat = tensor.contiguous();
  std::vector<at::Tensor> tensors = {flat};
  group()->broadcast(tensors)->wait();
  if (!flat.is_same(tensor)) tensor.copy_(flat);
}

std::string Ranks::on_main(const std::function<std::string()>& function) const {
  if (count() == 1) return function();
  at::Tensor bytes;
  std::exception_ptr error;
  if (is_main()) {
    try {
      bytes = to_bytes(function(), /*failed=*/false);
    } catch (const c10::Error& thrown) {
      error = std::current_exception();
      bytes = to_bytes(thrown.what_without_backtrace(), /*failed=*/true);
    } catch (const std::exception& thrown) {
      error = std::current_exception();
      bytes = to_bytes(thrown.what(), /*failed=*/true);
    }
  }
  at::Tensor length = at::tensor({is_main() ? bytes.numel() : 0}, at::kLong);
  broadcast_(length);
  if (!is_main()) bytes = at::empty({length.item<int64_t>()}, at::kByte);
  broadcast_(bytes);
  if (error) std::rethrow_exception(error);
  const auto* const begin = static_cast<const char*>(bytes.data_ptr());
  std::string text(begin, static_cast<size_t>(bytes.numel() - 1));
  TORCH_CHECK(begin[text.size()] == 0, "rank 0: ", text);
  return text;
}

}  // namespace cctorch::distributed
