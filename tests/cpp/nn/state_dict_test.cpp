#include <cctorch/codes.h>
#include <gtest/gtest.h>
#include <torch/types.h>

#include <string>
#include <vector>

#include "tests/cpp/refusal.h"
#include "tiny_net.h"

namespace cctorch {
namespace {

at::Tensor index(const std::vector<int64_t>& positions) { return torch::tensor(positions, torch::kLong); }

// The names are those that tests/python/test_apply.py expects of a layer behind a gather.
TEST(StateDict, HasTheNamesOfPythonsAndIsLoaded) {
  LayerPlan gathering = LayerPlan::unchanged("conv3", LayerKind::conv2d, 8, 12);
  gathering.kept_in = gathering.gather = {1, 2, 5};
  gathering.rank = 5;
  const CompressionPlan plan{.method = "by hand", .layers = {gathering}};
  TinyNet model, fresh;
  for (TinyNet* const net : {&model, &fresh}) cctorch::apply(**net, plan);
  const Batch batch = random_batch();
  model->forward(batch.x);
  const auto state = from_safetensors(to_safetensors({.tensors = state_dict(*model), .metadata = {}})).tensors;
  std::string names;
  for (const auto& [name, tensor] : state) {
    if (name.starts_with("conv3")) names += name + " ";
  }
  EXPECT_EQ(names, "conv3.index conv3.layer.first conv3.layer.second ");
  EXPECT_TRUE(torch::equal(state.at("conv3.index"), index(gathering.gather)));
  EXPECT_TRUE(state.contains("bn1.running_var") && state.contains("linear.bias"));
  load_state_dict(*fresh, state);
  model->eval();
  fresh->eval();
  EXPECT_TRUE(torch::equal(fresh->forward(batch.x), model->forward(batch.x)));
}

TEST(StateDict, WithCodesIsLoaded) {
  TinyNet model;
  auto state = state_dict(*model);
  const at::Tensor codes = torch::randint(-8, 8, model->conv2->weight.sizes()), scales = torch::rand({8}) + 0.1;
  const at::Tensor wanted = codes * scales.view({8, 1, 1, 1});
  state["conv2.weight"] = wanted;
  encode_weight(state, "conv2.weight", scales, 4);
  load_state_dict(*model, state);
  EXPECT_TRUE(torch::equal(model->conv2->weight, wanted));
}

TEST(StateDict, OfAnotherModelChangesNothing) {
  TinyNet model, given;
  LayerPlan gathering = LayerPlan::unchanged("conv2", LayerKind::conv2d, 8, 8);
  gathering.kept_in = gathering.gather = {1, 2, 5};
  cctorch::apply(*model, {.method = "by hand", .layers = {gathering}});
  gathering.kept_in = gathering.gather = {1, 2, 6};
  cctorch::apply(*given, {.method = "by hand", .layers = {gathering}});
  const at::Tensor before = model->conv1->weight.detach().clone();
  const auto refused = [&](const std::string& name, const at::Tensor& value, const std::string& message) {
    auto state = state_dict(*given);
    state["conv2.index"] = index({1, 2, 5});
    state[name] = value;
    if (!value.defined()) state.erase(name);
    const std::string found = refusal([&] { load_state_dict(*model, state); });
    EXPECT_NE(found.find(message), std::string::npos) << found;
    EXPECT_TRUE(torch::equal(model->conv1->weight, before));
  };
  refused("conv2.index", index({1, 2, 6}), "'conv2.index' gathers other channels");
  refused("bn2.running_mean", {}, "'bn2.running_mean' of this model is missing");
  refused("conv2.layer.weight", torch::ones({8, 8, 3, 3}), "has the shape [8, 8, 3, 3], expected [8, 3, 3, 3]");
  refused("extra", torch::ones({1}), "this model has no 'extra'");
}

}  // namespace
}  // namespace cctorch
