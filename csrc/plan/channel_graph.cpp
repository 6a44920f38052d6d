#include <c10/util/Exception.h>
#include <cctorch/channel_graph.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <unordered_map>
#include <unordered_set>
#include <utility>

namespace cctorch {

namespace {

bool passes_channels_on(LayerKind kind) {
  return kind == LayerKind::batch_norm2d || kind == LayerKind::depthwise_conv2d;
}

// The layer once only the channels `arriving` reach it, and only the filters `leaving` are read.
LayerPlan resolved(LayerPlan layer, LayerKind kind, const std::vector<int64_t>& arriving,
                   std::vector<int64_t> leaving) {
  if (layer.reads_nothing() && layer.kept_out.empty()) return layer;
  layer.kept_out = std::move(leaving);
  layer.gather.clear();
  if (layer.reads_nothing()) return layer;
  if (passes_channels_on(kind)) {
    layer.kept_in = arriving;
  } else if (layer.kept_in != arriving) {
    for (const int64_t kept : layer.kept_in) {
      layer.gather.push_back(std::lower_bound(arriving.begin(), arriving.end(), kept) - arriving.begin());
    }
  }
  return layer;
}

}  // namespace

int64_t ChannelGraph::root(int64_t channel) const {
  while (parent_[channel] != channel) channel = parent_[channel];
  return channel;
}

void ChannelGraph::unite(int64_t a, int64_t b) {
  a = root(a);
  b = root(b);
  if (a == b) return;
  const auto [low, high] = std::minmax(a, b);
  parent_[high] = low;
  if (pinned_[high]) pinned_[low] = 1;
}

ChannelGraph::Channels ChannelGraph::create(int64_t count) {
  TORCH_CHECK_VALUE(count > 0, "channel graph: ", count, " channels, expected at least 1");
  Channels made(count);
  std::iota(made.begin(), made.end(), static_cast<int64_t>(parent_.size()));
  parent_.insert(parent_.end(), made.begin(), made.end());
  pinned_.resize(parent_.size(), 0);
  return made;
}

void ChannelGraph::expect_own(const Channels& channels) const {
  const auto size = static_cast<int64_t>(parent_.size());
  for (const int64_t channel : channels) {
    TORCH_CHECK_VALUE(channel >= 0 && channel < size, "channel graph: channel ", channel, " is none of this graph's ",
                      size, ", expected what its input() and layer() gave");
  }
}

ChannelGraph::Channels ChannelGraph::input(int64_t channels) {
  Channels made = create(channels);
  pin(made);
  return made;
}

ChannelGraph::Channels ChannelGraph::layer(const std::string& name, LayerKind kind, const Channels& in,
                                           int64_t out_channels) {
  TORCH_CHECK_VALUE(!in.empty(), "channel graph: layer '", name, "' reads no channels");
  expect_own(in);
  const bool passes = passes_channels_on(kind);
  TORCH_CHECK_VALUE(!passes || std::cmp_equal(in.size(), out_channels), "channel graph: layer '", name, "' (",
                    to_string(kind), ") passes its channels on, but reads ", in.size(), " and writes ", out_channels);
  Channels out = passes ? in : create(out_channels);
  const auto earlier = std::find_if(nodes_.begin(), nodes_.end(), [&](const Node& node) { return node.name == name; });
  if (earlier != nodes_.end()) {
    for (const Channels& fixed : {earlier->in, earlier->out, in, out}) pin(fixed);
  } else {
    nodes_.push_back({name, kind, in, out});
  }
  return out;
}

ChannelGraph::Channels ChannelGraph::join(const Channels& a, const Channels& b) {
  TORCH_CHECK_VALUE(a.size() == b.size(), "channel graph: cannot join ", a.size(), " channels with ", b.size());
  expect_own(a);
  expect_own(b);
  for (size_t i = 0; i < a.size(); ++i) unite(a[i], b[i]);
  return a;
}

ChannelGraph::Channels ChannelGraph::flatten(const Channels& channels, int64_t features) {
  TORCH_CHECK_VALUE(features > 0, "channel graph: ", features, " features for each channel, expected at least 1");
  Channels flat;
  flat.reserve(channels.size() * features);
  for (const int64_t channel : channels) flat.insert(flat.end(), features, channel);
  return flat;
}

ChannelGraph::Channels ChannelGraph::concat(const std::vector<Channels>& parts) {
  Channels whole;
  for (const Channels& part : parts) whole.insert(whole.end(), part.begin(), part.end());
  return whole;
}

void ChannelGraph::pin(const Channels& channels) {
  expect_own(channels);
  for (const int64_t channel : channels) pinned_[root(channel)] = 1;
}

std::vector<char> ChannelGraph::live_roots(const Planned& planned) const {
  std::vector<char> live = pinned_;
  for (const Node& node : nodes_) {
    if (passes_channels_on(node.kind)) continue;
    const auto found = planned.find(node.name);
    if (found == planned.end()) {
      for (const int64_t channel : node.in) live[root(channel)] = 1;
      continue;
    }
    TORCH_CHECK_VALUE(std::cmp_equal(found->second->in_channels, node.in.size()) &&
                          std::cmp_equal(found->second->out_channels, node.out.size()),
                      "plan: layer '", node.name, "' is ", found->second->in_channels, " -> ",
                      found->second->out_channels, " channels, but in the model it is ", node.in.size(), " -> ",
                      node.out.size());
    for (const int64_t kept : found->second->kept_in) live[root(node.in[kept])] = 1;
  }
  for (const Node& node : nodes_) {
    const auto found = planned.find(node.name);
    if (found != planned.end() && found->second->kept_out.empty()) continue;
    const auto lives = [&](int64_t channel) { return live[root(channel)] != 0; };
    // Nobody reads the layer at all: it keeps one filter, which arrives wherever its filters did.
    if (std::none_of(node.out.begin(), node.out.end(), lives)) live[root(node.out.front())] = 1;
  }
  return live;
}

void ChannelGraph::resolve(CompressionPlan& plan) const {
  plan.validate();
  Planned planned;
  for (LayerPlan& layer : plan.layers) planned.emplace(layer.name, &layer);

  const std::vector<char> live = live_roots(planned);
  const auto survivors = [&](const Channels& channels) {
    std::vector<int64_t> indices;
    for (size_t i = 0; i < channels.size(); ++i) {
      if (live[root(channels[i])]) indices.push_back(static_cast<int64_t>(i));
    }
    return indices;
  };

  std::vector<LayerPlan> added;
  for (const Node& node : nodes_) {
    const auto found = planned.find(node.name);
    LayerPlan layer = found != planned.end()
                          ? *found->second
                          : LayerPlan::unchanged(node.name, node.kind, std::ssize(node.in), std::ssize(node.out));
    layer = resolved(std::move(layer), node.kind, survivors(node.in), survivors(node.out));
    if (found != planned.end()) {
      *found->second = std::move(layer);
    } else if (!layer.is_unchanged()) {
      added.push_back(std::move(layer));
    }
  }
  plan.layers.insert(plan.layers.end(), std::make_move_iterator(added.begin()), std::make_move_iterator(added.end()));
}

const ChannelGraph::Node& ChannelGraph::node(const std::string& layer) const {
  const auto found = std::find_if(nodes_.begin(), nodes_.end(), [&](const Node& node) { return node.name == layer; });
  TORCH_CHECK_VALUE(found != nodes_.end(), "channel graph: there is no layer '", layer, "'");
  return *found;
}

LayerPlan ChannelGraph::unchanged(const std::string& layer) const {
  const Node& found = node(layer);
  return LayerPlan::unchanged(found.name, found.kind, std::ssize(found.in), std::ssize(found.out));
}

std::vector<std::string> ChannelGraph::producers(const std::string& layer) const {
  const Node* const reader = &node(layer);
  std::unordered_set<int64_t> inputs;
  for (const int64_t channel : reader->in) {
    if (pinned_[root(channel)] || !inputs.insert(root(channel)).second) return {};
  }
  const auto carries = [&](int64_t channel) { return inputs.contains(root(channel)); };
  std::vector<std::string> names;
  for (const Node& node : nodes_) {
    if (&node == reader) continue;
    const bool reads = std::any_of(node.in.begin(), node.in.end(), carries);
    if (reads && !passes_channels_on(node.kind)) return {};
    if (std::any_of(node.out.begin(), node.out.end(), carries)) names.push_back(node.name);
  }
  return names;
}

std::vector<std::vector<std::string>> ChannelGraph::streams() const {
  struct Stream {
    std::vector<std::string> readers;
    bool shared = true;
  };
  std::vector<Stream> streams;
  std::map<Channels, size_t> by_roots;
  std::unordered_map<int64_t, size_t> by_root;
  for (const Node& node : nodes_) {
    if (passes_channels_on(node.kind)) continue;
    Channels roots;
    for (const int64_t channel : node.in) roots.push_back(root(channel));
    const auto [found, first] = by_roots.try_emplace(roots, streams.size());
    const size_t own = found->second;
    if (first) streams.emplace_back();
    streams[own].readers.push_back(node.name);
    if (!first) continue;
    for (const int64_t channel : roots) {
      const auto [other, alone] = by_root.try_emplace(channel, own);
      if (pinned_[channel] || !alone) streams[own].shared = streams[other->second].shared = false;
    }
  }
  std::erase_if(streams, [](const Stream& stream) { return !stream.shared || stream.readers.size() < 2; });
  std::vector<std::vector<std::string>> groups;
  for (Stream& stream : streams) groups.push_back(std::move(stream.readers));
  return groups;
}

}  // namespace cctorch
