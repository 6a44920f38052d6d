#pragma once

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/options/conv.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <iosfwd>
#include <optional>
#include <utility>

namespace cctorch::nn {

struct FakeQuantOptions {
  explicit FakeQuantOptions(int64_t bits) : bits_(bits) {}

  TORCH_ARG(int64_t, bits);                                // 2 to 16
  TORCH_ARG(bool, is_signed) = true;                       // [-2^(bits-1), 2^(bits-1) - 1], else [0, 2^bits - 1]
  TORCH_ARG(std::optional<int64_t>, axis) = std::nullopt;  // one scale for each index of this dimension
  TORCH_ARG(int64_t, channels) = 1;                        // number of scales; 1 when `axis` is absent
};

// cctorch::fake_quant with its scales as the parameter `log_scale` (`channels` elements). The first call, unless
// initialize() or a checkpoint came before it, sets them from x.
class FakeQuantImpl : public torch::nn::Cloneable<FakeQuantImpl> {
 public:
  explicit FakeQuantImpl(int64_t bits) : FakeQuantImpl(FakeQuantOptions(bits)) {}
  explicit FakeQuantImpl(const FakeQuantOptions& options);

  void reset() override;
  void load(torch::serialize::InputArchive& archive) override;
  void pretty_print(std::ostream& stream) const override;
  int64_t qmin() const;
  int64_t qmax() const;

  // s = 2 mean|x| / sqrt(qmax) (LSQ, section 2.1).
  void initialize(const at::Tensor& x);
  at::Tensor forward(const at::Tensor& x);

  FakeQuantOptions options;
  at::Tensor log_scale;

 private:
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
  // E.g. one of magnitude_masks(), nm_mask() or channel_mask().
  explicit MaskImpl(at::Tensor mask);

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& weight);

  at::Tensor mask;
};
TORCH_MODULE(Mask);

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

// The factors of a convolution: kh x kw, then 1 x 1; or 1 x kw, then kh x 1.
enum class LowRankLayout { channel, spatial };

// cctorch::low_rank_conv2d with the parameters `first`, `second` and `bias`; with two ranks, of the outputs and of the
// inputs, cctorch::tucker2_conv2d with `core` as well.
class LowRankConv2dImpl : public torch::nn::Cloneable<LowRankConv2dImpl> {
 public:
  // `options` as for a Conv2d without groups and with zero padding given in numbers.
  LowRankConv2dImpl(torch::nn::Conv2dOptions options, int64_t rank, LowRankLayout layout = LowRankLayout::channel);
  LowRankConv2dImpl(torch::nn::Conv2dOptions options, std::pair<int64_t, int64_t> ranks);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& x);

  // The factors become those of the truncated SVD (or Tucker-2) of a weight N x C x kh x kw, balanced.
  void factorize(const at::Tensor& weight);

  torch::nn::Conv2dOptions options;
  at::Tensor first, core, second, bias;

 private:
  void check() const;

  int64_t rank_;
  LowRankLayout layout_ = LowRankLayout::channel;
  std::optional<std::pair<int64_t, int64_t>> ranks_;
};
TORCH_MODULE(LowRankConv2d);

}  // namespace cctorch::nn
