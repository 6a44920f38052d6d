#pragma once

#include <torch/nn/module.h>

#include <memory>
#include <utility>
#include <vector>

namespace cctorch {

// Eval mode, until the end of the scope.
class EvalMode {
 public:
  explicit EvalMode(torch::nn::Module& model) : model_(model), was_training_(model.is_training()) {
    for (const auto& module : model.modules(/*include_self=*/false)) {
      modules_.emplace_back(module, module->is_training());
    }
    model.eval();
  }
  ~EvalMode() {
    // Parents come first: train() reaches the children as well.
    model_.train(was_training_);
    for (const auto& [module, training] : modules_) module->train(training);
  }
  EvalMode(const EvalMode&) = delete;
  EvalMode& operator=(const EvalMode&) = delete;

 private:
  torch::nn::Module& model_;
  bool was_training_;
  std::vector<std::pair<std::shared_ptr<torch::nn::Module>, bool>> modules_;
};

}  // namespace cctorch
