#pragma once

#include <cstdint>
#include <iosfwd>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace cctorch {

// lstm: one weight matrix of a recurrent module. It keeps all its channels and may have a rank.
enum class LayerKind { conv2d, depthwise_conv2d, linear, batch_norm2d, lstm };

std::string_view to_string(LayerKind kind);

// One layer of the dense model, as far as counting its work needs it.
struct LayerSpec {
  std::string name;  // path of the module in the model, e.g. "layer1.0.conv1"; of the parameter, for lstm
  LayerKind kind = LayerKind::conv2d;
  int64_t in_channels = 0;  // features for a linear layer
  int64_t out_channels = 0;
  int64_t kernel_height = 1;
  int64_t kernel_width = 1;
  int64_t positions = 1;  // output height x width; rows per example of a linear layer, steps in time of an lstm
  int64_t groups = 1;
  int64_t bits = 32;  // that a weight is stored in
  int64_t stride_height = 1;
  int64_t stride_width = 1;

  int64_t kernel_size() const { return kernel_height * kernel_width; }
  int64_t macs() const;        // multiply-accumulates per example; 0 for a normalization
  int64_t parameters() const;  // of the weight alone
};

// The convolutions that take the place of a k x k one of C inputs and N outputs:
//   channel  k x k to `rank` channels, then 1 x 1
//   spatial  1 x kw to `rank` channels, then kh x 1
//   tucker   1 x 1 to `rank_in` channels, k x k to `rank`, then 1 x 1
enum class LowRankLayout { channel, spatial, tucker };

std::string_view to_string(LowRankLayout layout);

struct MaskPlan {
  enum class Kind { magnitude, nm, channel };
  Kind kind = Kind::magnitude;
  double sparsity = 0.0;  // magnitude, channel: fraction of zeros
  int64_t n = 2;          // nm: n of every m weights are kept
  int64_t m = 4;

  bool operator==(const MaskPlan&) const = default;
};

std::string_view to_string(MaskPlan::Kind kind);

// What happens to one layer. Channel indices refer to the dense model and are sorted. A layer without kept_in reads
// nothing: it gives its bias everywhere, zeros if it has none. Without kept_out too it gives a tensor of no channels.
// Both are what is left of a residual branch that is removed.
struct LayerPlan {
  std::string name;
  LayerKind kind = LayerKind::conv2d;
  int64_t in_channels = 0;
  int64_t out_channels = 0;
  std::vector<int64_t> kept_in;
  std::vector<int64_t> kept_out;
  // Positions of kept_in within the tensor that reaches the compressed layer. Empty: the tensor holds exactly kept_in.
  std::vector<int64_t> gather;
  std::optional<int64_t> rank;  // absent: one dense layer
  LowRankLayout layout = LowRankLayout::channel;
  std::optional<int64_t> rank_in;  // tucker alone
  std::optional<MaskPlan> mask;
  std::optional<int64_t> bits;

  static LayerPlan unchanged(std::string name, LayerKind kind, int64_t in_channels, int64_t out_channels);
  bool keeps_shape() const;   // all channels, in one part, whatever acts on the weight
  bool is_unchanged() const;  // that, and no mask or bits
  bool reads_nothing() const { return kept_in.empty(); }
  bool operator==(const LayerPlan&) const = default;
};

// The one currency of the library: every method makes a plan, apply() carries one out, a checkpoint is a plan and
// tensors.
struct CompressionPlan {
  std::string method;   // who made it, e.g. "collaborative"
  double target = 0.0;  // requested reduction of the budget, 0 for none
  std::vector<LayerPlan> layers;

  const LayerPlan* find(std::string_view name) const;
  LayerPlan* find(std::string_view name);

  // Throws c10::Error naming the layer and the field if an index is out of range, unsorted or repeated, a rank is too
  // large, or a name occurs twice.
  void validate() const;

  // Throws c10::ValueError where a name is not UTF-8 or a number not finite.
  std::string to_json() const;
  static CompressionPlan from_json(std::string_view text);
  bool operator==(const CompressionPlan&) const = default;
};

std::ostream& operator<<(std::ostream& out, const CompressionPlan& plan);

// Multiply-accumulates of one layer under a plan. `narrowed` counts removed filters (kept_out) too. A convolution
// before the one that strides, of the layouts spatial and tucker, counts positions times stride.
int64_t layer_macs(const LayerSpec& spec, const LayerPlan* plan, bool narrowed);

// Of the model: nominal counts removed input channels and ranks (the method's own budget), final counts dead filters
// too.
int64_t nominal_macs(const std::vector<LayerSpec>& model, const CompressionPlan& plan);
int64_t final_macs(const std::vector<LayerSpec>& model, const CompressionPlan& plan);
int64_t dense_macs(const std::vector<LayerSpec>& model);

// Drops the rank of every layer that has, once dead filters are gone, as many multiply-accumulates factored as it would
// have with its exact weight. Call it after ChannelGraph::resolve(); the nominal count is that of before.
void drop_idle_ranks(const std::vector<LayerSpec>& model, CompressionPlan& plan);

}  // namespace cctorch
