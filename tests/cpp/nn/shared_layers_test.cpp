#include <gtest/gtest.h>
#include <torch/types.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "tiny_net.h"

namespace cctorch {
namespace {

// One module under two names, called twice, at 8 x 8 and at 4 x 4 positions.
struct RepeatedImpl : torch::nn::Module {
  RepeatedImpl() {
    register_module("first", first);
    register_module("shared", shared);
    register_module("alias", shared);
    register_module("bn", bn);
    register_module("last", last);
    to(torch::kDouble);
  }
  at::Tensor forward(const at::Tensor& x) {
    const at::Tensor y = shared(first(x)).relu();
    return last(bn(shared(at::max_pool2d(y, 2))).mean({2, 3}));
  }
  nn::Conv2d first{torch::nn::Conv2dOptions(3, 8, 3).padding(1)}, shared{torch::nn::Conv2dOptions(8, 8, 3).padding(1)};
  nn::BatchNorm2d bn{8};
  nn::Linear last{8, 4};
};

TEST(LayerSpecs, CountEveryCallOfASharedLayerUnderItsFirstName) {
  const auto model = std::make_shared<RepeatedImpl>();
  std::string found;
  for (const LayerSpec& spec : layer_specs(*model, [&] { model->forward(torch::randn({2, 3, 8, 8}, torch::kDouble)); }))
    found += spec.name + " " + std::to_string(spec.positions) + " ";
  EXPECT_EQ(found, "first 64 shared 80 bn 16 last 1 ");
}

// Module::modules() throws for one that no shared_ptr holds.
TEST(OnTheStack, AModelIsCompressedLikeOthers) {
  RepeatedImpl model;
  const at::Tensor x = torch::randn({4, 3, 8, 8}, torch::kDouble), labels = torch::randint(4, {4}, torch::kLong);
  const auto specs = collaborative::participants(layer_specs(model, [&] { model.forward(x); }));
  bool done = false;
  const auto layers = collaborative::mean_gradients(model, specs, [&]() -> std::optional<collaborative::BatchLoss> {
    if (std::exchange(done, true)) return std::nullopt;
    return collaborative::BatchLoss{torch::cross_entropy_loss(model.forward(x), labels), 4};
  });
  done = false;
  reestimate_batch_norm(model, [&] {
    if (!done) model.forward(x);
    return !std::exchange(done, true);
  });
  EXPECT_TRUE(model.is_training());
  EXPECT_EQ(model.bn->num_batches_tracked.item<int64_t>(), 1);
  model.eval();
  torch::cross_entropy_loss(model.forward(x), labels).backward();
  ASSERT_EQ(layers.size(), 1u);
}

}  // namespace
}  // namespace cctorch
