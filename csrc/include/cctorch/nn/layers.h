#pragma once

#include <cctorch/distributed.h>
#include <cctorch/nn/compressible.h>
#include <cctorch/nn/factors.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/options/conv.h>
#include <torch/nn/options/linear.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <iosfwd>
#include <string>
#include <utility>
#include <vector>

namespace cctorch::nn {

// A layer with a weight that can be narrowed and factored: the parameters are `weight` and `bias`, or, once factored,
// `first`, `second` and `bias`, and for the layout tucker `core`; just `bias` once the layer reads nothing. Those that
// it does not have are undefined. While it is prepared, weights also have children: weight_mask and weight_quant.
template <typename Derived>
class WeightedLayer : public torch::nn::Cloneable<Derived>, public Compressible {
 public:
  // PyTorch's default initialization, of the factors too.
  void reset_parameters();

  std::vector<std::pair<std::string, at::Tensor>> weights() const override;
  void constrain(const Constraint& constraint) override;
  void bake() override;

  at::Tensor weight, first, core, second, bias;

 protected:
  void carry_out(const LayerPlan& plan) override;

  // Empty parameters: `kernel` is the shape of the weight beyond its first two dimensions.
  void register_parameters(int64_t out, int64_t in, at::IntArrayRef kernel, bool with_bias);

  bool reads_nothing() const { return plan_ && plan_->reads_nothing(); }
  int64_t stored_bits() const;  // of a weight

  // What the layer computes with in place of `parameter`, one of weights().
  at::Tensor constrained(const at::Tensor& parameter) const;

  // What the layer reads of x, along `dimension`.
  at::Tensor gathered(const at::Tensor& x, int64_t dimension);

  void print_plan(std::ostream& stream) const;

 private:
  friend Derived;
  WeightedLayer() = default;

  void register_factors(const Factors& factors, bool requires_grad);
  void leave_bias_only(const LayerPlan& plan);

  at::Tensor gather_;
};

// torch::nn::Conv2d, with zero padding given in numbers; factored as in low_rank_conv2d or tucker2_conv2d.
class Conv2dImpl : public WeightedLayer<Conv2dImpl> {
 public:
  Conv2dImpl(int64_t in_channels, int64_t out_channels, torch::ExpandingArray<2> kernel_size);
  explicit Conv2dImpl(const torch::nn::Conv2dOptions& options);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  LayerSpec spec(const std::string& name) const override;

  // x: batch x channels x height x width.
  at::Tensor forward(const at::Tensor& x);

  torch::nn::Conv2dOptions options;  // of the dense layer

 protected:
  void check_structure(const LayerPlan& plan) const override;

 private:
  bool depthwise() const;
  at::Tensor constant(const at::Tensor& x) const;
};
TORCH_MODULE(Conv2d);

// torch::nn::Linear; factored as in low_rank_linear.
class LinearImpl : public WeightedLayer<LinearImpl> {
 public:
  LinearImpl(int64_t in_features, int64_t out_features);
  explicit LinearImpl(const torch::nn::LinearOptions& options);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  LayerSpec spec(const std::string& name) const override;

  // x: batch x ... x features.
  at::Tensor forward(const at::Tensor& x);

  torch::nn::LinearOptions options;  // of the dense layer

 protected:
  void check_structure(const LayerPlan& plan) const override;
};
TORCH_MODULE(Linear);

// torch::nn::BatchNorm2d; its channels follow those of the layer before it.
class BatchNorm2dImpl : public torch::nn::BatchNormImplBase<2, BatchNorm2dImpl>, public Compressible {
 public:
  using BatchNormImplBase<2, BatchNorm2dImpl>::BatchNormImplBase;

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  LayerSpec spec(const std::string& name) const override;
  at::Tensor forward(const at::Tensor& x);

  // From now on training is by the statistics of all ranks' examples, as if one process had them; a rank may have none.
  // Every rank has to call forward, and the backward pass.
  void synchronize(distributed::Ranks ranks) { ranks_ = std::move(ranks); }
  const distributed::Ranks& ranks() const { return ranks_; }

 protected:
  void check_structure(const LayerPlan& plan) const override;
  void carry_out(const LayerPlan& plan) override;
  void _check_input_dim(const at::Tensor& x) override;

 private:
  at::Tensor compute(const at::Tensor& x);
  at::Tensor synchronized_forward(const at::Tensor& x);
  void leave_bias_only();

  distributed::Ranks ranks_;
};
TORCH_MODULE(BatchNorm2d);

}  // namespace cctorch::nn
