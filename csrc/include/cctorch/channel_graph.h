#pragma once

#include <cctorch/plan.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace cctorch {

// Which channels of a network live and die together. A network is described once, in order of execution; each call
// names the channels of one activation. After a plan has chosen the input channels that each layer reads, resolve()
// finds the filters that nobody reads any more and writes them, with the gathers that remain, into the plan.
//
//   ChannelGraph graph;
//   auto x = graph.input(3);
//   auto y = graph.layer("conv1", LayerKind::conv2d, x, 16);
//   y = graph.layer("bn1", LayerKind::batch_norm2d, y, 16);
//   graph.pin(graph.layer("conv2", LayerKind::conv2d, y, 16));
//   graph.resolve(plan);
class ChannelGraph {
 public:
  // One entry per channel of an activation. Opaque to callers, except that slicing and concatenating it mean what they
  // say. Those of another graph are refused with c10::ValueError where this one has no such channel.
  using Channels = std::vector<int64_t>;

  // Channels that cannot be removed: the network's input, or the output of something that is not followed.
  Channels input(int64_t channels);

  // A layer reads `in` and makes `out_channels` new channels; a normalization or depthwise convolution passes `in` on.
  // A name that occurs again is a shared module: both inputs and both outputs become fixed.
  Channels layer(const std::string& name, LayerKind kind, const Channels& in, int64_t out_channels);

  // Element-wise combination: channel i of `a` and channel i of `b` live and die together.
  Channels join(const Channels& a, const Channels& b);

  // Channels followed by `features` values each, as flatten(1) lays them out.
  static Channels flatten(const Channels& channels, int64_t features);

  static Channels concat(const std::vector<Channels>& parts);

  // Something that is not followed reads these channels: all of them stay.
  void pin(const Channels& channels);

  // Fills kept_out and gather of every layer of the graph. Layers that the plan does not name read all their inputs;
  // they are added to the plan where they lose filters or need a gather. One that the plan leaves neither inputs nor
  // outputs stays without.
  void resolve(CompressionPlan& plan) const;

  // The plan of a layer that keeps everything.
  LayerPlan unchanged(const std::string& layer) const;

  // The layers that would lose filters with the inputs that `layer` gives up, in order of execution: those that make
  // its inputs, and the normalizations and depthwise convolutions on the way. Empty where giving up an input costs a
  // gather instead: another layer reads the same channels, or one of them cannot be removed or arrives more than once.
  std::vector<std::string> producers(const std::string& layer) const;

  // Groups of at least two layers that read the same channels, in one order, and are the only ones that read any of
  // them: what all of a group give up goes without a gather. Channels that cannot be removed or arrive more than once
  // make no group. In order of execution.
  std::vector<std::vector<std::string>> streams() const;

 private:
  struct Node {
    std::string name;
    LayerKind kind;
    Channels in, out;
  };

  const Node& node(const std::string& layer) const;
  int64_t root(int64_t channel) const;
  void unite(int64_t a, int64_t b);
  Channels create(int64_t count);
  void expect_own(const Channels& channels) const;

  using Planned = std::unordered_map<std::string_view, LayerPlan*>;
  // By root: whether the channel stays: some layer reads it, it is pinned, or it is the last of its layer.
  std::vector<char> live_roots(const Planned& planned) const;

  std::vector<int64_t> parent_;
  std::vector<char> pinned_;
  std::vector<Node> nodes_;
};

}  // namespace cctorch
