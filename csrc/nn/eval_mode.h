#pragma once

#include <cctorch/nn/lstm.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/rnn.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace cctorch {

// The model may be on the stack, where Module::modules() throws unless it leaves the model itself out.
template <typename Visit>
void visit_modules(torch::nn::Module& model, const Visit& visit) {
  visit(model);
  for (const auto& module : model.modules(/*include_self=*/false)) visit(*module);
}

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

// Inside the scope of an EvalMode: recurrent layers that can be differentiated. cuDNN does so in training mode alone,
// which differs by their dropout: that is 0 meanwhile. Their mode is EvalMode's to put back.
class RecurrentGradients {
 public:
  explicit RecurrentGradients(torch::nn::Module& model) {
    visit_modules(model, [&](torch::nn::Module& module) {
      add(dynamic_cast<nn::LSTMImpl*>(&module));
      add(dynamic_cast<torch::nn::LSTMImpl*>(&module));
      add(dynamic_cast<torch::nn::GRUImpl*>(&module));
      add(dynamic_cast<torch::nn::RNNImpl*>(&module));
    });
  }
  ~RecurrentGradients() {
    for (const auto& restore : restore_) restore();
  }
  RecurrentGradients(const RecurrentGradients&) = delete;
  RecurrentGradients& operator=(const RecurrentGradients&) = delete;

 private:
  template <typename Layer>
  void add(Layer* layer) {
    if (layer == nullptr) return;
    restore_.push_back([layer, dropout = layer->options.dropout()] { layer->options.dropout(dropout); });
    layer->options.dropout(0.0);
    layer->train();
  }

  std::vector<std::function<void()>> restore_;
};

}  // namespace cctorch
