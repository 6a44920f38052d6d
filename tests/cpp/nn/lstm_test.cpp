#include <gtest/gtest.h>
#include <torch/cuda.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/rnn.h>
#include <torch/optim/sgd.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "tests/cpp/refusal.h"
#include "tiny_net.h"

namespace cctorch {
namespace {

using torch::nn::LSTMOptions;
using States = std::optional<std::tuple<at::Tensor, at::Tensor>>;

LSTMOptions options_of(int64_t layers, bool bidirectional, int64_t projection, bool bias, bool batch_first) {
  return LSTMOptions(6, 8)
      .num_layers(layers)
      .bidirectional(bidirectional)
      .proj_size(projection)
      .bias(bias)
      .batch_first(batch_first);
}

LayerPlan plan_of(const std::string& weight, int64_t rows, int64_t columns, int64_t rank) {
  LayerPlan layer = LayerPlan::unchanged(weight, LayerKind::lstm, columns, rows);
  layer.rank = rank;
  return layer;
}

CompressionPlan planned(std::vector<LayerPlan> layers) {
  return {.method = "test", .target = 0.0, .layers = std::move(layers)};
}

at::Tensor truncated(const at::Tensor& weight, int64_t rank) {
  const auto [u, s, v] = torch::linalg_svd(weight, /*full_matrices=*/false);
  return u.narrow(1, 0, rank).matmul(s.narrow(0, 0, rank).diag()).matmul(v.narrow(0, 0, rank));
}

struct NetImpl : torch::nn::Cloneable<NetImpl> {
  explicit NetImpl(const LSTMOptions& options_) : options(options_) {
    NetImpl::reset();
    to(torch::kDouble);
  }
  void reset() override {
    r = register_module("r", nn::LSTM(options));
    head = register_module("head", nn::Linear(8, 5));
  }
  at::Tensor loss(const at::Tensor& x, const at::Tensor& labels) {
    return torch::cross_entropy_loss(head(std::get<0>(r(x)).select(0, -1)), labels);
  }
  LSTMOptions options;
  nn::LSTM r{nullptr};
  nn::Linear head{nullptr};
};
TORCH_MODULE(Net);

// Ours and torch's of one architecture, in float64 with the same values.
class SameLSTM : public testing::TestWithParam<LSTMOptions> {
 protected:
  SameLSTM() {
    torch::manual_seed(0);
    theirs->to(torch::kDouble);
    net->to(torch::kDouble);
    torch::NoGradGuard no_grad;
    for (auto& parameter : theirs->named_parameters())
      parameter.value().copy_(ours->named_parameters()[parameter.key()]);
  }

  // Of rank 3 or 2, but for one weight, in ours by apply() and in torch's by their values.
  void factor() {
    std::vector<LayerPlan> layers;
    torch::NoGradGuard no_grad;
    for (auto& parameter : theirs->named_parameters()) {
      if (!parameter.key().starts_with("weight") || parameter.key() == "weight_ih_l0") continue;
      at::Tensor& weight = parameter.value();
      const int64_t rank = weight.size(1) > 4 ? 3 : 2;
      weight.copy_(truncated(weight, rank));
      layers.push_back(plan_of("r." + parameter.key(), weight.size(0), weight.size(1), rank));
    }
    cctorch::apply(*net, planned(std::move(layers)));
  }

  void expect_same() {
    const int64_t batch = 3, steps = 4, places = GetParam().num_layers() * (GetParam().bidirectional() ? 2 : 1);
    const int64_t outputs = GetParam().proj_size() > 0 ? GetParam().proj_size() : 8;
    const at::Tensor x = GetParam().batch_first() ? torch::randn({batch, steps, 6}, torch::kDouble)
                                                  : torch::randn({steps, batch, 6}, torch::kDouble);
    const at::Tensor h = torch::randn({places, batch, outputs}, torch::kDouble),
                     c = torch::randn({places, batch, 8}, torch::kDouble);
    for (const States& states : {States(), States({h, c})}) {
      const auto [y, last] = ours->forward(x, states);
      const auto [wanted, wanted_last] = theirs->forward(x, states);
      expect_near(y, wanted);
      expect_near(std::get<0>(last), std::get<0>(wanted_last));
      expect_near(std::get<1>(last), std::get<1>(wanted_last));
      const auto packed =
          torch::nn::utils::rnn::pack_padded_sequence(x, torch::tensor({2, 4, 1}), GetParam().batch_first(),
                                                      /*enforce_sorted=*/false);
      const auto [ours_packed, ours_last] = ours->forward_with_packed_input(packed, states);
      const auto [theirs_packed, theirs_last] = theirs->forward_with_packed_input(packed, states);
      expect_near(ours_packed.data(), theirs_packed.data());
      EXPECT_TRUE(torch::equal(ours_packed.unsorted_indices(), theirs_packed.unsorted_indices()));
      expect_near(std::get<0>(ours_last), std::get<0>(theirs_last));
      expect_near(std::get<1>(ours_last), std::get<1>(theirs_last));
    }
  }

  static void expect_near(const at::Tensor& a, const at::Tensor& b) {
    ASSERT_EQ(a.sizes(), b.sizes());
    EXPECT_LT((a - b).abs().max().item<double>(), 1e-12);
  }

  Net net{GetParam()};
  nn::LSTM ours = net->r;
  torch::nn::LSTM theirs{GetParam()};
};

TEST_P(SameLSTM, DenseComputesWhatTorchsDoes) {
  ASSERT_EQ(ours->named_parameters().keys(), theirs->named_parameters().keys());
  expect_same();
}

TEST_P(SameLSTM, FactoredComputesWhatTorchsDoesOfTheProjectedWeights) {
  factor();
  expect_same();
}

TEST_P(SameLSTM, GradientsReachTheFactors) {
  factor();
  const at::Tensor x = torch::randn({4, 4, 6}, torch::kDouble);
  std::get<0>(ours->forward(x)).square().sum().backward();
  std::get<0>(theirs->forward(x)).square().sum().backward();
  const auto values = ours->named_parameters();
  for (const auto& dense : theirs->named_parameters()) {
    const at::Tensor* const first = values.find(dense.key() + "_first");
    if (first == nullptr) {
      expect_near(values[dense.key()].grad(), dense.value().grad());
    } else {
      expect_near(first->grad(), values[dense.key() + "_second"].t().mm(dense.value().grad()));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, SameLSTM,
                         testing::Values(options_of(1, false, 0, true, false), options_of(2, true, 0, true, true),
                                         options_of(2, true, 4, true, false), options_of(3, false, 0, false, true),
                                         options_of(1, true, 4, false, false)));

TEST(LSTM, StateHasTheNamesOfPython) {
  Net net(LSTMOptions(6, 8));
  cctorch::apply(*net, planned({plan_of("r.weight_hh_l0", 32, 8, 2)}));
  const std::vector<std::string> expected = {"weight_ih_l0", "weight_hh_l0_first", "weight_hh_l0_second", "bias_ih_l0",
                                             "bias_hh_l0"};
  EXPECT_EQ(net->r->named_parameters().keys(), expected);
  Safetensors::Tensors state = state_dict(*net);
  EXPECT_EQ(state.size(), expected.size() + 2);
  for (auto& [name, value] : state) value = torch::full_like(value, 0.25);
  load_state_dict(*net, state);
  EXPECT_TRUE((net->r->named_parameters()["weight_hh_l0_second"] == 0.25).all().item<bool>());
}

// The whole way, with as many multiply-accumulates left as the plan says.
TEST(LSTM, IsSearchedAndApplied) {
  torch::manual_seed(0);
  Net net(LSTMOptions(6, 8).num_layers(2).dropout(0.5));
  const at::Tensor x = torch::randn({7, 3, 6}, torch::kDouble), labels = torch::randint(5, {3}, torch::kLong);
  const auto specs = layer_specs(*net, [&] { net->loss(x, labels); });
  ASSERT_EQ(specs.size(), 5);
  EXPECT_EQ(specs[1].name, "r.weight_hh_l0");
  EXPECT_EQ(specs[1].kind, LayerKind::lstm);
  EXPECT_EQ(specs[1].macs(), 7 * 32 * 8);
  EXPECT_EQ(specs[1].bits, 64);
  EXPECT_EQ(specs[0].macs(), 7 * 32 * 6);

  const auto chosen = collaborative::participants(specs);
  ASSERT_EQ(chosen.size(), 4);
  bool given = false;
  const auto layers = collaborative::mean_gradients(*net, chosen, [&]() -> std::optional<collaborative::BatchLoss> {
    if (std::exchange(given, true)) return std::nullopt;
    return collaborative::BatchLoss{net->loss(x, labels), 3};
  });
  EXPECT_EQ(net->r->options.dropout(), 0.5);
  EXPECT_TRUE(net->r->is_training());
  net->eval();
  net->loss(x, labels).backward();
  EXPECT_TRUE(torch::allclose(layers[1].gradient, net->r->named_parameters()["weight_hh_l0"].grad()));

  const auto dense = static_cast<double>(dense_macs(specs));
  const CompressionPlan plan = collaborative::solve(layers, dense, {.target = 0.3}).plan;
  cctorch::apply(*net, plan);
  int64_t macs = net->head->weight.numel();
  for (const auto& parameter : net->r->named_parameters()) {
    if (parameter.value().dim() == 2) macs += 7 * parameter.value().numel();
  }
  EXPECT_EQ(final_macs(specs, plan), macs);
  EXPECT_LE(static_cast<double>(macs), 0.7 * dense);
  EXPECT_TRUE(net->loss(x, labels).isfinite().item<bool>());
}

TEST(LSTM, TheOptimizerKeepsWhatStaysAndTakesTheFactors) {
  Net net(LSTMOptions(6, 8));
  torch::optim::SGD optimizer(net->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
  const at::Tensor x = torch::randn({4, 3, 6}, torch::kDouble), labels = torch::randint(5, {3}, torch::kLong);
  net->loss(x, labels).backward();
  optimizer.step();
  const at::Tensor bias = net->r->named_parameters()["bias_hh_l0"];
  const auto momentum = [&] {
    const auto& state = *optimizer.state().at(bias.unsafeGetTensorImpl());
    return dynamic_cast<const torch::optim::SGDParamState&>(state).momentum_buffer();
  };
  const at::Tensor before = momentum().clone();
  cctorch::apply(*net, planned({plan_of("r.weight_ih_l0", 32, 6, 2), plan_of("r.weight_hh_l0", 32, 8, 3)}), &optimizer);
  EXPECT_TRUE(torch::equal(momentum(), before));
  const auto expected = net->parameters();
  ASSERT_EQ(optimizer.parameters().size(), 8);
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_TRUE(optimizer.parameters()[i].is_same(expected[i])) << i;
  EXPECT_EQ(optimizer.state().size(), 4);
}

TEST(LSTM, ClonesWithItsRanks) {
  Net net(LSTMOptions(6, 8).num_layers(2));
  net->r->named_parameters()["weight_hh_l1"].set_requires_grad(false);
  cctorch::apply(*net, planned({plan_of("r.weight_hh_l1", 32, 8, 2)}));
  const auto copy = std::dynamic_pointer_cast<NetImpl>(net->clone());
  const at::Tensor x = torch::randn({4, 3, 6}, torch::kDouble);
  EXPECT_TRUE(torch::equal(std::get<0>(copy->r->forward(x)), std::get<0>(net->r->forward(x))));
  EXPECT_FALSE(net->r->named_parameters()["weight_hh_l1_first"].requires_grad());
  const std::string text = refusal([&] { cctorch::apply(*copy, planned({plan_of("r.weight_hh_l1", 32, 8, 2)})); });
  EXPECT_NE(text.find("'r.weight_hh_l1' is compressed already"), std::string::npos) << text;
  // Which has weights of its own.
  cctorch::apply(*copy, planned({plan_of("r.weight_ih_l0", 32, 6, 1)}));
  EXPECT_TRUE(net->r->named_parameters().contains("weight_ih_l0"));
  EXPECT_EQ(copy->r->named_parameters()["weight_ih_l0_first"].size(0), 1);
}

TEST(LSTM, IsUsedInASequential) {
  torch::nn::AnyModule any(nn::LSTM(6, 8));
  using Result = std::tuple<at::Tensor, std::tuple<at::Tensor, at::Tensor>>;
  EXPECT_EQ(std::get<0>(any.forward<Result>(torch::randn({4, 3, 6}))).sizes(), at::IntArrayRef({4, 3, 8}));
}

TEST(LSTM, DropsBetweenItsLayersInTrainingAlone) {
  torch::manual_seed(0);
  Net net(LSTMOptions(6, 8).num_layers(2).dropout(1.0));
  cctorch::apply(*net, planned({plan_of("r.weight_hh_l0", 32, 8, 2)}));
  const at::Tensor x = torch::randn({4, 3, 6}, torch::kDouble), other = torch::randn({4, 3, 6}, torch::kDouble);
  EXPECT_TRUE(torch::equal(std::get<0>(net->r->forward(x)), std::get<0>(net->r->forward(other))));
  net->eval();
  EXPECT_FALSE(torch::equal(std::get<0>(net->r->forward(x)), std::get<0>(net->r->forward(other))));
}

TEST(LSTM, SaysWhatIsWrong) {
  const auto expect = [](const auto& call, const char* text) {
    const std::string message = refusal(call);
    EXPECT_NE(message.find(text), std::string::npos) << message;
  };
  Net net(LSTMOptions(6, 8));
  expect([] { nn::LSTM(0, 8); }, "input_size = 0, hidden_size = 8, num_layers = 1, expected at least 1 each");
  expect([] { nn::LSTM(LSTMOptions(6, 8).proj_size(8)); }, "proj_size = 8, expected 0 or less than hidden_size, 8");
  expect([&] { net->r->forward(torch::randn({4, 3, 5}, torch::kDouble)); },
         "x has shape [4, 3, 5], expected 3 dimensions, of which the last has 6 features");
  expect([&] { net->r->forward(torch::randn({3, 6}, torch::kDouble)); }, "x has shape [3, 6], expected 3 dimensions");
  const at::Tensor x = torch::randn({4, 3, 6}, torch::kDouble), state = torch::zeros({1, 2, 8}, torch::kDouble);
  expect([&] { net->r->forward(x, std::tuple(state, state)); }, "expected [1, 3, 8] and [1, 3, 8]");
  expect([&] { cctorch::apply(*net, planned({plan_of("r.weight_hh_l0", 32, 7, 2)})); },
         "'r.weight_hh_l0' is a lstm of 8 -> 32 channels, but the plan expects a lstm of 7 -> 32");
  expect([&] { cctorch::apply(*net, planned({plan_of("r.weight_hh_l1", 32, 8, 2)})); },
         "the model has no layer 'r.weight_hh_l1', it has r.weight_ih_l0, r.weight_hh_l0, head");
}

TEST(LSTM, ComputesTheSameOnAGpu) {
  if (!torch::cuda::is_available()) GTEST_SKIP() << "no CUDA device";
  Net net(LSTMOptions(6, 8).num_layers(2).bidirectional(true).proj_size(4));
  const at::Tensor x = torch::randn({7, 3, 6}, torch::kDouble);
  for (const bool factored : {false, true}) {
    net->to(torch::kCPU);
    if (factored)
      cctorch::apply(*net, planned({plan_of("r.weight_hh_l0", 32, 4, 2), plan_of("r.weight_ih_l1", 32, 8, 2)}));
    const at::Tensor wanted = std::get<0>(net->r->forward(x));
    net->to(torch::kCUDA);
    const at::Tensor y = std::get<0>(net->r->forward(x.cuda()));
    EXPECT_LT((y.cpu() - wanted).abs().max().item<double>(), 1e-10);
    y.sum().backward();
    const auto values = net->r->parameters();
    EXPECT_EQ(std::ranges::all_of(values, [&](const at::Tensor& v) { return v.is_alias_of(values[0]); }), !factored);
  }
  // On the device, of weights that lie in one piece.
  Net other(LSTMOptions(6, 8));
  other->to(torch::kCUDA);
  other->r->forward(x.cuda());
  cctorch::apply(*other, planned({plan_of("r.weight_hh_l0", 32, 8, 2)}));
  for (const at::Tensor& value : other->r->parameters()) EXPECT_EQ(value.storage().nbytes(), value.nbytes());
  EXPECT_TRUE(std::get<0>(other->r->forward(x.cuda())).isfinite().all().item<bool>());
}

}  // namespace
}  // namespace cctorch
