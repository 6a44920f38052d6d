#include <ATen/core/grad_mode.h>
#include <ATen/ops/tensor.h>
#include <cctorch/distributed.h>
#include <torch/nn/module.h>
#include <torch/csrc/distributed/c10d/reducer.hpp>

#include <unordered_map>

namespace cctorch::distributed {
namespace {

using Named = std::vector<std::pair<std::string, at::Tensor>>;

Named named_state(const torch::nn::Module& model) {
  Named all;
  for (const auto& parameter : model.named_parameters()) all.emplace_back(parameter.key(), parameter.value());
  for (const auto& buffer : model.named_buffers()) all.emplace_back(buffer.key(), buffer.value());
  return all;
}

// FNV-1a, of 64 bits.
int64_t hash(const void* data, size_t bytes) {
  uint64_t result = 0xcbf29ce484222325;
  const auto* const begin = static_cast<const unsigned char*>(data);
  for (size_t i = 0; i < bytes; ++i) result = (result ^ begin[i]) * 0x100000001b3;
  return static_cast<int64_t>(result);
}

int64_t hash(const at::Tensor& tensor) {
  const at::Tensor elements = tensor.detach().cpu().contiguous();
  return hash(elements.data_ptr(), elements.nbytes());
}

void compare(std::string_view what, const std::vector<std::string>& names, const std::vector<int64_t>& hashes,
             const Ranks& ranks) {
  const at::Tensor found = ranks.gather(at::tensor(hashes, at::kLong));
  const auto values = found.accessor<int64_t, 2>();
  for (size_t i = 0; i < names.size(); ++i) {
    std::string others;
    for (int64_t rank = 1; rank < ranks.count(); ++rank) {
      if (values[rank][i] != values[0][i]) others += (others.empty() ? "" : ", ") + std::to_string(rank);
    }
    TORCH_CHECK(others.empty(), what, ": '", names[i], "' of rank ", others,
                " is not that of rank 0; expected the same bits. Give all ranks the same software, kind of machine and "
                "threads");
  }
}

}  // namespace

void broadcast_state(torch::nn::Module& model, const Ranks& ranks) {
  const at::NoGradGuard no_grad;
  for (const auto& [name, tensor] : named_state(model)) ranks.broadcast_(tensor);
}

void assert_identical(std::string_view what, const torch::nn::Module& model, const Ranks& ranks) {
  if (ranks.count() == 1) return;
  std::vector<std::string> names;
  std::vector<int64_t> hashes;
  std::string joined;
  for (const auto& [name, tensor] : named_state(model)) {
    names.push_back(name);
    hashes.push_back(hash(tensor));
    joined += name + "\n";
  }
  compare(what, {"the names of the layers"}, {hash(joined.data(), joined.size())}, ranks);
  compare(what, names, hashes, ranks);
}

DataParallel::DataParallel(torch::nn::Module& model, const Ranks& ranks) : ranks_(ranks.count()) {
  if (ranks_ == 1) return;
  broadcast_state(model, ranks);
  std::vector<at::Tensor> parameters;
  std::unordered_map<size_t, std::string> names;
  for (const auto& parameter : model.named_parameters()) {
    if (!parameter.value().requires_grad()) continue;
    names[parameters.size()] = parameter.key();
    parameters.push_back(parameter.value());
  }
  // As DistributedDataParallel does: a small bucket first, of the last layers, so that something goes out early.
  const std::vector<size_t> sizes = {c10d::kDefaultFirstBucketBytes, c10d::kDefaultBucketBytesCap};
  const std::vector<bool> sparse(parameters.size(), false);
  auto buckets = std::get<0>(c10d::compute_bucket_assignment_by_size(parameters, sizes, sparse));
  reducer_ = std::make_unique<c10d::Reducer>(
      std::move(parameters), std::vector<std::vector<size_t>>(buckets.rbegin(), buckets.rend()), ranks.group(), sparse,
      c10d::kDefaultBucketBytesCap, /*find_unused_parameters=*/false, /*gradient_as_bucket_view=*/false,
      std::move(names), c10d::kDefaultFirstBucketBytes, /*skip_all_reduce_unused_params=*/false,
      /*use_python_reducer=*/false, std::vector<int64_t>{});
}

DataParallel::~DataParallel() = default;

void DataParallel::backward(const at::Tensor& loss, double share) {
  if (!reducer_) {
    loss.backward();
    return;
  }
  reducer_->rebuild_buckets();
  reducer_->prepare_for_backward({});
  // The reducer divides by the number of ranks.
  (loss * (share * static_cast<double>(ranks_))).backward();
}

}  // namespace cctorch::distributed
