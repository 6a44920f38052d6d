#include <ATen/core/grad_mode.h>
#include <cctorch/nn/batch_norm.h>
#include <cctorch/nn/layers.h>
#include <torch/nn/modules/batchnorm.h>

#include <functional>
#include <optional>
#include <vector>

#include "csrc/nn/eval_mode.h"

namespace cctorch {
namespace {

// Puts back what was changed for the time being; the statistics too, unless the new ones are kept.
using Finish = std::function<void(bool keep)>;

template <typename Norm>
std::optional<Finish> start(torch::nn::Module& module) {
  auto* const norm = dynamic_cast<Norm*>(&module);
  if (norm == nullptr || !norm->running_mean.defined()) return std::nullopt;
  const std::vector<at::Tensor> statistics = {norm->running_mean, norm->running_var, norm->num_batches_tracked};
  std::vector<at::Tensor> saved;
  for (const at::Tensor& statistic : statistics) saved.push_back(statistic.clone());
  const std::optional<double> momentum = norm->options.momentum();
  norm->reset_running_stats();
  norm->options.momentum(std::nullopt);  // a cumulative average
  norm->train();
  return [=](bool keep) {
    norm->options.momentum(momentum);
    for (size_t i = 0; !keep && i < saved.size(); ++i) statistics[i].copy_(saved[i]);
  };
}

class Reestimation {
 public:
  explicit Reestimation(torch::nn::Module& model) : eval_(model) {
    for (const auto& module : model.modules()) {
      for (const auto start_one : {start<nn::BatchNorm2dImpl>, start<torch::nn::BatchNorm1dImpl>,
                                   start<torch::nn::BatchNorm2dImpl>, start<torch::nn::BatchNorm3dImpl>}) {
        if (auto finish = start_one(*module)) finish_.push_back(*std::move(finish));
      }
    }
  }
  ~Reestimation() {
    for (const Finish& finish : finish_) finish(keep_);
  }
  Reestimation(const Reestimation&) = delete;
  Reestimation& operator=(const Reestimation&) = delete;

  void keep() { keep_ = true; }

 private:
  EvalMode eval_;
  std::vector<Finish> finish_;
  bool keep_ = false;
};

}  // namespace

void reestimate_batch_norm(torch::nn::Module& model, const std::function<bool()>& next_batch) {
  const at::NoGradGuard no_grad;
  Reestimation reestimation(model);
  TORCH_CHECK_VALUE(next_batch(), "next_batch: no batch, expected at least one");
  while (next_batch()) {
  }
  reestimation.keep();
}

}  // namespace cctorch
