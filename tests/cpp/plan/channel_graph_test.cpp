#include <c10/util/Exception.h>
#include <cctorch/channel_graph.h>
#include <gtest/gtest.h>

namespace cctorch {
namespace {

using Indices = std::vector<int64_t>;

LayerPlan reading(const std::string& name, int64_t in, int64_t out, Indices kept_in) {
  LayerPlan layer = LayerPlan::unchanged(name, LayerKind::conv2d, in, out);
  layer.kept_in = std::move(kept_in);
  return layer;
}

TEST(ChannelGraph, RemovesFiltersThatNobodyReads) {
  ChannelGraph graph;
  auto x = graph.layer("a", LayerKind::conv2d, graph.input(3), 4);
  x = graph.layer("bn", LayerKind::batch_norm2d, x, 4);
  graph.pin(graph.layer("b", LayerKind::conv2d, x, 2));
  CompressionPlan plan{"test", 0, {reading("b", 4, 2, {1, 3})}};
  graph.resolve(plan);
  EXPECT_EQ(plan.find("a")->kept_out, (Indices{1, 3}));
  EXPECT_EQ(plan.find("bn")->kept_in, (Indices{1, 3}));
  EXPECT_TRUE(plan.find("b")->gather.empty());
  EXPECT_EQ(plan.find("b")->kept_out, (Indices{0, 1}));
}

TEST(ChannelGraph, TwoReadersKeepTheUnionAndGather) {
  ChannelGraph graph;
  const auto x = graph.layer("a", LayerKind::conv2d, graph.input(3), 4);
  graph.pin(graph.layer("b", LayerKind::conv2d, x, 2));
  graph.pin(graph.layer("c", LayerKind::conv2d, x, 2));
  CompressionPlan plan{"test", 0, {reading("b", 4, 2, {1}), reading("c", 4, 2, {1, 3})}};
  graph.resolve(plan);
  EXPECT_EQ(plan.find("a")->kept_out, (Indices{1, 3}));
  EXPECT_EQ(plan.find("b")->gather, (Indices{0}));
  EXPECT_TRUE(plan.find("c")->gather.empty());
}

TEST(ChannelGraph, ASumTiesItsTermsTogether) {
  ChannelGraph graph;
  const auto image = graph.input(3);
  const auto a = graph.layer("a", LayerKind::conv2d, image, 3);
  const auto b = graph.layer("b", LayerKind::conv2d, image, 3);
  const auto sum = graph.join(a, b);
  graph.pin(graph.layer("c", LayerKind::conv2d, sum, 1));
  graph.pin(graph.layer("d", LayerKind::conv2d, b, 1));
  CompressionPlan plan{"test", 0, {reading("c", 3, 1, {0}), reading("d", 3, 1, {2})}};
  graph.resolve(plan);
  EXPECT_EQ(plan.find("a")->kept_out, (Indices{0, 2}));
  EXPECT_EQ(plan.find("b")->kept_out, (Indices{0, 2}));
  EXPECT_EQ(plan.find("d")->gather, (Indices{1}));
}

TEST(ChannelGraph, PinnedChannelsStay) {
  ChannelGraph graph;
  const auto x = graph.layer("a", LayerKind::conv2d, graph.input(3), 4);
  graph.pin(x);
  graph.pin(graph.layer("b", LayerKind::conv2d, x, 2));
  CompressionPlan plan{"test", 0, {reading("b", 4, 2, {1, 3})}};
  graph.resolve(plan);
  EXPECT_EQ(plan.find("a"), nullptr);
  EXPECT_EQ(plan.find("b")->gather, (Indices{1, 3}));
}

TEST(ChannelGraph, ConcatAndFlattenFollowPositions) {
  ChannelGraph graph;
  const auto image = graph.input(3);
  const auto a = graph.layer("a", LayerKind::conv2d, image, 2);
  const auto b = graph.layer("b", LayerKind::conv2d, image, 2);
  const auto flat = ChannelGraph::flatten(ChannelGraph::concat({a, b}), 2);
  graph.pin(graph.layer("head", LayerKind::linear, flat, 5));
  LayerPlan head = LayerPlan::unchanged("head", LayerKind::linear, 8, 5);
  head.kept_in = {1, 4, 5};  // one feature of a's channel 0, both of b's channel 0
  CompressionPlan plan{"test", 0, {head}};
  graph.resolve(plan);
  EXPECT_EQ(plan.find("a")->kept_out, (Indices{0}));
  EXPECT_EQ(plan.find("b")->kept_out, (Indices{0}));
  EXPECT_EQ(plan.find("head")->gather, (Indices{1, 2, 3}));
}

TEST(ChannelGraph, TheLastFilterOfAnUnreadLayerArrivesInTheConcatenation) {
  ChannelGraph graph;
  const auto x = graph.input(3);
  const auto unread = graph.layer("unread", LayerKind::conv2d, x, 4);
  const auto read = graph.layer("read", LayerKind::conv2d, x, 4);
  graph.pin(graph.layer("reader", LayerKind::conv2d, ChannelGraph::concat({unread, read}), 2));
  CompressionPlan plan;
  plan.layers = {LayerPlan::unchanged("reader", LayerKind::conv2d, 8, 2)};
  plan.layers[0].kept_in = {4, 5, 6, 7};
  graph.resolve(plan);
  EXPECT_EQ(plan.find("unread")->kept_out, (std::vector<int64_t>{0}));
  EXPECT_EQ(plan.find("reader")->gather, (std::vector<int64_t>{1, 2, 3, 4}));
}

TEST(ChannelGraph, ASharedLayerIsFixed) {
  ChannelGraph graph;
  const auto image = graph.input(2);
  const auto a = graph.layer("a", LayerKind::conv2d, image, 2);
  const auto once = graph.layer("shared", LayerKind::conv2d, a, 2);
  const auto twice = graph.layer("shared", LayerKind::conv2d, once, 2);
  graph.pin(graph.layer("b", LayerKind::conv2d, twice, 2));
  CompressionPlan plan{"test", 0, {reading("b", 2, 2, {1})}};
  graph.resolve(plan);
  EXPECT_EQ(plan.find("a"), nullptr);
  EXPECT_EQ(plan.find("shared"), nullptr);
  EXPECT_EQ(plan.find("b")->gather, (Indices{1}));
}

TEST(ChannelGraph, RefusesAPlanOfAnotherModel) {
  ChannelGraph graph;
  graph.pin(graph.layer("b", LayerKind::conv2d, graph.input(4), 2));
  CompressionPlan plan{"test", 0, {reading("b", 5, 2, {1})}};
  EXPECT_THROW(graph.resolve(plan), c10::Error);
  EXPECT_THROW(graph.join(graph.input(2), graph.input(3)), c10::Error);
}

TEST(ChannelGraph, RefusesChannelsOfAnotherGraph) {
  ChannelGraph graph, other;
  const auto own = graph.input(2);
  other.input(1000000);
  for (const auto& foreign : {other.input(2), ChannelGraph::Channels{0, -1}}) {
    EXPECT_THROW(graph.pin(foreign), c10::ValueError);
    EXPECT_THROW(graph.join(own, foreign), c10::ValueError);
    EXPECT_THROW(graph.join(foreign, own), c10::ValueError);
    EXPECT_THROW(graph.layer("a", LayerKind::conv2d, foreign, 8), c10::ValueError);
  }
}

TEST(ChannelGraph, ProducersAreWhoLosesFiltersWithTheInputs) {
  using Names = std::vector<std::string>;
  ChannelGraph graph;
  const auto stream = graph.layer("stem", LayerKind::conv2d, graph.input(3), 4);
  auto x = graph.layer("a", LayerKind::conv2d, stream, 6);
  x = graph.layer("bn", LayerKind::batch_norm2d, x, 6);
  x = graph.layer("depthwise", LayerKind::depthwise_conv2d, x, 6);
  x = graph.layer("b", LayerKind::conv2d, x, 4);
  const auto sum = graph.join(stream, x);
  const auto c = graph.layer("c", LayerKind::conv2d, sum, 5);
  const auto d = graph.layer("d", LayerKind::linear, ChannelGraph::flatten(c, 2), 2);
  graph.pin(d);
  graph.layer("e", LayerKind::linear, d, 2);

  EXPECT_EQ(graph.producers("b"), (Names{"a", "bn", "depthwise"}));
  EXPECT_EQ(graph.producers("a"), Names{});     // c reads the stream too
  EXPECT_EQ(graph.producers("stem"), Names{});  // the image stays
  EXPECT_EQ(graph.producers("d"), Names{});     // every channel arrives twice
  EXPECT_EQ(graph.producers("e"), Names{});     // pinned
  EXPECT_THROW(graph.producers("f"), c10::ValueError);
}

TEST(ChannelGraph, StreamsAreReadByTheirGroupAlone) {
  using Groups = std::vector<std::vector<std::string>>;
  ChannelGraph graph;
  const auto image = graph.input(3);
  graph.pin(graph.layer("edge", LayerKind::conv2d, image, 3));
  auto x = graph.layer("stem", LayerKind::conv2d, image, 4);
  for (const std::string block : {"1", "2"}) {
    auto y = graph.layer("in" + block, LayerKind::conv2d, x, 6);
    y = graph.layer("bn" + block, LayerKind::batch_norm2d, y, 6);
    x = graph.join(x, graph.layer("out" + block, LayerKind::conv2d, y, 4));
  }
  x = graph.layer("bn", LayerKind::batch_norm2d, x, 4);
  // Two that read a part of what others read, two that read each channel twice, two of which one has another order.
  const auto a = graph.layer("a", LayerKind::conv2d, x, 4);
  const auto b = graph.layer("b", LayerKind::conv2d, x, 4);
  const auto some = ChannelGraph::Channels(a.begin(), a.begin() + 2);
  for (const std::string name : {"some1", "some2"}) graph.pin(graph.layer(name, LayerKind::conv2d, some, 2));
  const auto c = graph.layer("all", LayerKind::conv2d, a, 4);
  for (const std::string name : {"twice1", "twice2"}) {
    graph.pin(graph.layer(name, LayerKind::linear, ChannelGraph::flatten(c, 2), 2));
  }
  graph.pin(graph.layer("first", LayerKind::conv2d, b, 2));
  graph.pin(graph.layer("turned", LayerKind::conv2d, {b.rbegin(), b.rend()}, 2));
  EXPECT_EQ(graph.streams(), (Groups{{"in1", "in2", "a", "b"}}));
  graph.pin({x.back()});
  EXPECT_EQ(graph.streams(), Groups{});
}

TEST(ChannelGraph, TermsOfASumWithOneReaderAreAllProducers) {
  ChannelGraph graph;
  const auto image = graph.input(3);
  const auto a = graph.layer("a", LayerKind::conv2d, image, 4);
  const auto b = graph.layer("b", LayerKind::conv2d, image, 4);
  graph.pin(graph.layer("c", LayerKind::conv2d, graph.join(a, b), 2));
  EXPECT_EQ(graph.producers("c"), (std::vector<std::string>{"a", "b"}));
}

}  // namespace
}  // namespace cctorch
