#include <ATen/ATen.h>
#include <cctorch/low_rank.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/types.h>

#include <array>
#include <optional>
#include <vector>

#include "tests/cpp/refusal.h"

namespace cctorch {
namespace {

constexpr int64_t inputs = 5, hidden = 4, rank = 2, batch = 3;

at::Tensor random(at::IntArrayRef sizes) { return torch::randn(sizes, torch::dtype(at::kDouble)); }

struct Layer {
  std::vector<at::Tensor> ih{random({rank, inputs}), random({4 * hidden, rank})};
  std::vector<at::Tensor> hh{random({rank, hidden}), random({4 * hidden, rank})};
  at::Tensor bias_ih = random({4 * hidden}), bias_hh = random({4 * hidden});
  at::Tensor h = random({batch, hidden}), c = random({batch, hidden});

  std::vector<at::Tensor> merged() const { return {ih[1].mm(ih[0]), hh[1].mm(hh[0]), bias_ih, bias_hh}; }
};

// A step at a time, with nothing but the definition.
std::array<at::Tensor, 3> by_definition(const Layer& layer, const at::Tensor& x, bool reverse) {
  at::Tensor h = layer.h, c = layer.c;
  std::vector<at::Tensor> outputs(x.size(0));
  for (int64_t i = 0; i < x.size(0); ++i) {
    const int64_t t = reverse ? x.size(0) - 1 - i : i;
    const at::Tensor gates = x[t].mm(layer.ih[1].mm(layer.ih[0]).t()) + layer.bias_ih +
                             h.mm(layer.hh[1].mm(layer.hh[0]).t()) + layer.bias_hh;
    const auto gate = [&](int64_t which) { return gates.narrow(1, which * hidden, hidden); };
    c = gate(1).sigmoid() * c + gate(0).sigmoid() * gate(2).tanh();
    h = gate(3).sigmoid() * c.tanh();
    outputs[t] = h;
  }
  return {at::stack(outputs), h, c};
}

TEST(LowRankLstm, IsTheLstmOfTheMergedWeights) {
  torch::manual_seed(0);
  const Layer layer;
  const at::Tensor x = random({6, batch, inputs});
  for (const bool reverse : {false, true}) {
    const auto [y, h, c] =
        low_rank_lstm(x, layer.h, layer.c, layer.ih, layer.hh, {}, layer.bias_ih, layer.bias_hh, {}, reverse);
    const auto [wanted, last_h, last_c] = by_definition(layer, x, reverse);
    EXPECT_TRUE(y.allclose(wanted, 1e-12, 1e-12));
    EXPECT_TRUE(h.allclose(last_h, 1e-12, 1e-12));
    EXPECT_TRUE(c.allclose(last_c, 1e-12, 1e-12));
  }
}

TEST(LowRankLstm, PackedSequencesAreThoseOfAten) {
  torch::manual_seed(0);
  const Layer layer;
  const at::Tensor sizes = torch::tensor({3, 3, 2, 1}, at::kLong), x = random({9, inputs});
  const auto [y, h, c] =
      low_rank_lstm(x, layer.h, layer.c, layer.ih, layer.hh, {}, layer.bias_ih, layer.bias_hh, sizes);
  const auto [wanted, last_h, last_c] =
      at::lstm(x, sizes, {layer.h.unsqueeze(0), layer.c.unsqueeze(0)}, layer.merged(), true, 1, 0.0, false, false);
  EXPECT_TRUE(y.allclose(wanted, 1e-12, 1e-12));
  EXPECT_TRUE(h.allclose(last_h[0], 1e-12, 1e-12));
  EXPECT_TRUE(c.allclose(last_c[0], 1e-12, 1e-12));
}

TEST(LowRankLstm, GradientsAreThoseOfTheDefinition) {
  torch::manual_seed(0);
  Layer layer;
  const at::Tensor x = random({4, batch, inputs}).requires_grad_();
  std::vector<at::Tensor> leaves{x,           layer.h,     layer.c,     layer.ih[0],
                                 layer.ih[1], layer.hh[0], layer.hh[1], layer.bias_ih};
  for (at::Tensor& leaf : leaves) leaf.requires_grad_();
  const auto gradients = [&](const at::Tensor& y, const at::Tensor& c) {
    return torch::autograd::grad({y.pow(2).sum() + c.pow(3).sum()}, leaves);
  };
  const auto [y, h, c] =
      low_rank_lstm(x, layer.h, layer.c, layer.ih, layer.hh, {}, layer.bias_ih, layer.bias_hh, {}, true);
  const auto wanted = by_definition(layer, x, true);
  const auto ours = gradients(y, c), theirs = gradients(wanted[0], wanted[2]);
  for (size_t i = 0; i < leaves.size(); ++i) EXPECT_TRUE(ours[i].allclose(theirs[i], 1e-10, 1e-10)) << i;
}

TEST(LowRankLstm, NamesWhatDoesNotFit) {
  const Layer layer;
  const at::Tensor x = random({6, batch, inputs});
  const auto message = [&](const at::Tensor& input, const at::Tensor& state, at::TensorList weight,
                           const std::optional<at::Tensor>& sizes = std::nullopt) {
    return refusal([&] { low_rank_lstm(input, state, layer.c, weight, layer.hh, {}, {}, {}, sizes); });
  };
  EXPECT_NE(message(x[0], layer.h, layer.ih).find("x must be steps x batch x inputs"), std::string::npos);
  EXPECT_NE(message(x.narrow(0, 0, 0), layer.h, layer.ih).find("at least one step"), std::string::npos);
  EXPECT_NE(message(x, layer.h.narrow(0, 0, 2), layer.ih).find("of one batch"), std::string::npos);
  EXPECT_NE(message(x, layer.h, {layer.ih[0]}).find("weight_ih must give 16 features"), std::string::npos);
  EXPECT_NE(message(x, layer.h, {}).find("weight_ih must be a matrix or two factors"), std::string::npos);
  EXPECT_NE(message(x, layer.h, {layer.ih[0], random({16, 3})}).find("must have one rank"), std::string::npos);
  EXPECT_NE(message(x[0], layer.h, layer.ih, torch::tensor({1, 2}, at::kLong)).find("and not rise"), std::string::npos);
  EXPECT_NE(message(x[0], layer.h, layer.ih, torch::tensor({3, 1}, at::kLong)).find("add up to the 3 rows"),
            std::string::npos);
}

}  // namespace
}  // namespace cctorch
