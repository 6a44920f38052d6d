#pragma once

#include <cctorch/nn/compressible.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/options/rnn.h>
#include <torch/nn/pimpl.h>
#include <torch/nn/utils/rnn.h>

#include <cstdint>
#include <iosfwd>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace cctorch::nn {

class LSTMImpl;

// One weight of an LSTM: a layer that gives up nothing but singular values.
class LSTMWeight : public Compressible {
 public:
  LSTMWeight(std::string name, int64_t rows, int64_t columns);

  LayerSpec spec(const std::string& name) const override;
  std::vector<std::pair<std::string, at::Tensor>> weights() const override;

 protected:
  void check_structure(const LayerPlan& plan) const override;
  void carry_out(const LayerPlan& plan) override;

 private:
  friend LSTMImpl;

  void count(int64_t steps);

  LSTMImpl* of_ = nullptr;  // whoever asked for layers() has it
  std::string name_;
  int64_t rows_, columns_;
};

// torch::nn::LSTM, any weight of which can be factored: parameters are named as there, such as weight_ih_l0, or, once
// it has a rank, weight_ih_l0_first (rank x columns) and weight_ih_l0_second (rows x rank), as in low_rank_lstm.
class LSTMImpl : public torch::nn::Cloneable<LSTMImpl> {
 public:
  using States = std::tuple<at::Tensor, at::Tensor>;  // h and c, each layers x batch x features

  LSTMImpl(int64_t input_size, int64_t hidden_size);
  explicit LSTMImpl(const torch::nn::LSTMOptions& options);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  // x: steps x batch x features, or batch x steps x features with `batch_first`; states of zeros where there are none.
  std::tuple<at::Tensor, States> forward(const at::Tensor& x, const std::optional<States>& states = {});
  std::tuple<torch::nn::utils::rnn::PackedSequence, States> forward_with_packed_input(
      const torch::nn::utils::rnn::PackedSequence& packed, const std::optional<States>& states = {});

  // Its weights, by the names of the dense parameters: a plan names them by the path of this module, a dot and that.
  std::vector<std::pair<std::string, Compressible*>> layers();

  torch::nn::LSTMOptions options;  // of the dense layer

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(std::optional<States>())})

 private:
  friend LSTMWeight;

  // One layer in one direction: its index, and how the names of its parameters end.
  struct Place {
    int64_t layer;
    std::string suffix;
  };
  std::vector<Place> places() const;

  const LSTMWeight* find(const std::string& weight) const;
  std::vector<std::string> parts(const std::string& weight) const;
  std::vector<at::Tensor> values(const std::string& weight) const;
  void factor(const std::string& weight, const at::Tensor& first, const at::Tensor& second);
  bool factored() const;

  void check_input(const at::Tensor& x, int64_t dimensions) const;
  States checked(const std::optional<States>& states, const at::Tensor& x, int64_t batch) const;

  // Of x in order of steps, and packed where there are batch_sizes.
  std::tuple<at::Tensor, States> compute(const at::Tensor& x, const States& states, const at::Tensor& batch_sizes);
  std::tuple<at::Tensor, States> dense(const at::Tensor& x, const States& states, const at::Tensor& batch_sizes) const;
  std::tuple<at::Tensor, States> low_rank(const at::Tensor& x, const States& states,
                                          const at::Tensor& batch_sizes) const;

  std::vector<LSTMWeight> weights_;
};
TORCH_MODULE(LSTM);

}  // namespace cctorch::nn
