#include <ATen/core/grad_mode.h>
#include <cctorch/nn/batch_norm.h>
#include <cctorch/nn/layers.h>
#include <torch/nn/modules/batchnorm.h>

#include <functional>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "csrc/nn/eval_mode.h"

namespace cctorch {
namespace {

// Puts back what was changed for the time being; the statistics too, unless the new ones are kept.
using Finish = std::function<void(bool keep)>;

struct Started {
  Finish finish;
  std::vector<at::Tensor> averages;  // mean and variance
};

template <typename Norm>
std::optional<Started> start(torch::nn::Module& module, const distributed::Ranks& ranks) {
  auto* const norm = dynamic_cast<Norm*>(&module);
  if (norm == nullptr || !norm->running_mean.defined()) return std::nullopt;
  const std::vector<at::Tensor> statistics = {norm->running_mean, norm->running_var, norm->num_batches_tracked};
  std::vector<at::Tensor> saved;
  for (const at::Tensor& statistic : statistics) saved.push_back(statistic.clone());
  const std::optional<double> momentum = norm->options.momentum();
  norm->reset_running_stats();
  norm->options.momentum(std::nullopt);  // a cumulative average
  norm->train();
  distributed::Ranks synchronized;
  if constexpr (std::is_same_v<Norm, nn::BatchNorm2dImpl>) {
    synchronized = norm->ranks();
    norm->synchronize(ranks);
  }
  const auto finish = [=](bool keep) {
    if constexpr (std::is_same_v<Norm, nn::BatchNorm2dImpl>) norm->synchronize(synchronized);
    norm->options.momentum(momentum);
    for (size_t i = 0; !keep && i < saved.size(); ++i) statistics[i].copy_(saved[i]);
  };
  return Started{finish, {norm->running_mean, norm->running_var}};
}

class Reestimation {
 public:
  Reestimation(torch::nn::Module& model, const distributed::Ranks& ranks) : eval_(model), ranks_(ranks) {
    visit_modules(model, [&](torch::nn::Module& module) {
      for (const auto start_one : {start<nn::BatchNorm2dImpl>, start<torch::nn::BatchNorm1dImpl>,
                                   start<torch::nn::BatchNorm2dImpl>, start<torch::nn::BatchNorm3dImpl>}) {
        if (auto started = start_one(module, ranks)) started_.push_back(*std::move(started));
      }
    });
  }
  ~Reestimation() {
    for (const Started& started : started_) started.finish(keep_);
  }
  Reestimation(const Reestimation&) = delete;
  Reestimation& operator=(const Reestimation&) = delete;

  void keep() {
    for (const Started& started : started_) {
      for (at::Tensor average : started.averages) {
        ranks_.sum_(average);
        average /= static_cast<double>(ranks_.count());
      }
    }
    keep_ = true;
  }

 private:
  EvalMode eval_;
  distributed::Ranks ranks_;
  std::vector<Started> started_;
  bool keep_ = false;
};

}  // namespace

void reestimate_batch_norm(torch::nn::Module& model, const std::function<bool()>& next_batch,
                           const distributed::Ranks& ranks) {
  const at::NoGradGuard no_grad;
  Reestimation reestimation(model, ranks);
  TORCH_CHECK_VALUE(next_batch(), "next_batch: no batch, expected at least one");
  while (next_batch()) {
  }
  reestimation.keep();
}

}  // namespace cctorch
