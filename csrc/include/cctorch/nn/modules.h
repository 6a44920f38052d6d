#pragma once

#include <cctorch/plan.h>
#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/options/conv.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <iosfwd>
#include <optional>
#include <string>
#include <utility>

namespace cctorch::nn {

struct FakeQuantOptions {
  explicit FakeQuantOptions(int64_t bits) : bits_(bits) {}

  TORCH_ARG(int64_t, bits);                                // 2 to 16
  TORCH_ARG(bool, is_signed) = true;                       // [-2^(bits-1), 2^(bits-1) - 1], else [0, 2^bits - 1]
  TORCH_ARG(std::optional<int64_t>, axis) = std::nullopt;  // one scale for each index of this dimension
  TORCH_ARG(int64_t, channels) = 1;                        // size of that dimension; 1 when `axis` is absent
  TORCH_ARG(int64_t, groups) = 1;                          // scales for each index of axis 0, over equal parts of it
  TORCH_ARG(bool, offset) = false;                         // LSQ+: an offset with each scale
  TORCH_ARG(std::string, init) = "lsq";                    // where scales start: "lsq", "minmax" or "mse"
};

// cctorch::fake_quant, fake_quant_offset or fake_quant_groups with the scales as the parameter `log_scale` (`channels`
// elements, or channels x groups) and the offsets as the parameter `offset`. The first call sets them from x, unless
// they are no longer zeros: initialize(), a checkpoint or another module's parameters came before it. Half precision is
// quantized with scales of float32.
class FakeQuantImpl : public torch::nn::Cloneable<FakeQuantImpl> {
 public:
  explicit FakeQuantImpl(int64_t bits) : FakeQuantImpl(FakeQuantOptions(bits)) {}
  explicit FakeQuantImpl(FakeQuantOptions options);

  void reset() override;
  void load(torch::serialize::InputArchive& archive) override;
  void pretty_print(std::ostream& stream) const override;
  int64_t qmin() const;
  int64_t qmax() const;

  // "lsq": s = 2 mean|input| / sqrt(qmax) (LSQ, section 2.1), the offsets 0; else as quant_range() and
  // quant_range_offset() find them. Values that are not finite do not count; those two take them for zeros.
  void initialize(const at::Tensor& input);
  at::Tensor forward(const at::Tensor& x);

  // s, of the shape of log_scale, to the last bit as forward computes it: encode_weight (codes.h) of what that gave,
  // with axis 0 and no offset, takes these. exp(log_scale) may differ.
  at::Tensor scale() const;

  FakeQuantOptions options;
  at::Tensor log_scale, offset;

 private:
  // Values that share a scale are a channel of what this returns, along axis() of it.
  at::Tensor grouped(const at::Tensor& x) const;
  bool has_scales() const;
  std::optional<int64_t> axis() const { return options.groups() > 1 ? 0 : options.axis(); }

  bool initialized_ = false;
};
TORCH_MODULE(FakeQuant);

// cctorch::channel_gate with the parameter `gate`, all ones at first.
class ChannelGateImpl : public torch::nn::Cloneable<ChannelGateImpl> {
 public:
  explicit ChannelGateImpl(int64_t channels);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& x);

  at::Tensor gate;

 private:
  int64_t channels_;
};
TORCH_MODULE(ChannelGate);

// cctorch::apply_mask with the buffer `mask` (bool, true where a weight is kept).
class MaskImpl : public torch::nn::Cloneable<MaskImpl> {
 public:
  // E.g. one of magnitude_masks(), nm_masks() or channel_masks().
  explicit MaskImpl(at::Tensor mask);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& weight);

  at::Tensor mask;
};
TORCH_MODULE(Mask);

// cctorch::soft_threshold of a weight by sigmoid(s) (STR, Kusupati et al. 2020). The parameter `s` has one element, or
// `channels` where there is an axis.
class SoftThresholdImpl : public torch::nn::Cloneable<SoftThresholdImpl> {
 public:
  // threshold: sigmoid(s) at the start, between 0 and 1.
  explicit SoftThresholdImpl(double threshold = 1e-3, std::optional<int64_t> axis = std::nullopt, int64_t channels = 1);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& weight);

  at::Tensor s;

 private:
  double threshold_;
  std::optional<int64_t> axis_;
  int64_t channels_;
};
TORCH_MODULE(SoftThreshold);

// cctorch::channel_gate by cctorch::hard_concrete of the parameter `log_alpha`: drawn anew at every call in training.
class HardConcreteGateImpl : public torch::nn::Cloneable<HardConcreteGateImpl> {
 public:
  // open: probability that a gate is not 0 at the start, between 0 and 1.
  explicit HardConcreteGateImpl(int64_t channels, double open = 0.9);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& x);
  at::Tensor expected_l0() const;

  at::Tensor log_alpha;

 private:
  int64_t channels_;
  double open_;
};
TORCH_MODULE(HardConcreteGate);

struct LowRankLinearOptions {
  LowRankLinearOptions(int64_t in_features, int64_t out_features, int64_t rank)
      : in_features_(in_features), out_features_(out_features), rank_(rank) {}

  TORCH_ARG(int64_t, in_features);
  TORCH_ARG(int64_t, out_features);
  TORCH_ARG(int64_t, rank);
  TORCH_ARG(bool, bias) = true;
};

// cctorch::low_rank_linear with the parameters `first`, `second` and `bias`.
class LowRankLinearImpl : public torch::nn::Cloneable<LowRankLinearImpl> {
 public:
  LowRankLinearImpl(int64_t in_features, int64_t out_features, int64_t rank)
      : LowRankLinearImpl(LowRankLinearOptions(in_features, out_features, rank)) {}
  explicit LowRankLinearImpl(const LowRankLinearOptions& options);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& x);

  // The factors become those of the truncated SVD of a weight out_features x in_features, balanced.
  void factorize(const at::Tensor& weight);

  LowRankLinearOptions options;
  at::Tensor first, second, bias;
};
TORCH_MODULE(LowRankLinear);

using cctorch::LowRankLayout;

// cctorch::low_rank_conv2d with the parameters `first`, `second` and `bias`; with two ranks, of the outputs and of the
// inputs, cctorch::tucker2_conv2d with `core` as well.
class LowRankConv2dImpl : public torch::nn::Cloneable<LowRankConv2dImpl> {
 public:
  // `options` as for a Conv2d without groups and with zero padding given in numbers.
  LowRankConv2dImpl(const torch::nn::Conv2dOptions& options, int64_t rank,
                    LowRankLayout layout = LowRankLayout::channel);
  // Of the layout tucker: ranks of the outputs and of the inputs.
  LowRankConv2dImpl(const torch::nn::Conv2dOptions& options, std::pair<int64_t, int64_t> ranks);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& x);

  // The factors become those of the truncated SVD (or Tucker-2) of a weight N x C x kh x kw, balanced.
  void factorize(const at::Tensor& weight);

  torch::nn::Conv2dOptions options;
  at::Tensor first, core, second, bias;

 private:
  LowRankConv2dImpl(const torch::nn::Conv2dOptions& options, LowRankLayout layout, int64_t rank,
                    std::optional<int64_t> rank_in);

  LayerPlan form_;
};
TORCH_MODULE(LowRankConv2d);

}  // namespace cctorch::nn
