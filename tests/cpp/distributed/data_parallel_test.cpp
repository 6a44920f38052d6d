#include <cctorch/cctorch.h>
#include <gtest/gtest.h>
#include <torch/optim/sgd.h>
#include <torch/types.h>

#include <optional>
#include <string>
#include <vector>

#include "tests/cpp/distributed/ranks_in_threads.h"
#include "tests/cpp/nn/tiny_net.h"

namespace cctorch::distributed {
namespace {

constexpr double rounding = 1e-12;

void expect_equal(const at::Tensor& found, const at::Tensor& wanted, const std::string& name) {
  ASSERT_TRUE(found.defined() && wanted.defined()) << name;
  EXPECT_LT((found - wanted).abs().max().item<double>(), rounding * (1 + wanted.abs().max().item<double>())) << name;
}

void synchronize(TinyNet& model, const Ranks& ranks) {
  model->bn1->synchronize(ranks);
  model->bn2->synchronize(ranks);
}

Batch slice(const Batch& batch, const Ranks& ranks) {
  const auto [begin, length] = ranks.slice(batch.labels.size(0));
  return {batch.x.narrow(0, begin, length), batch.labels.narrow(0, begin, length)};
}

// Steps with torch::nn's own batch normalization, in one process.
struct Reference {
  explicit Reference(const TinyNet& start, const std::vector<Batch>& batches) {
    copy_state(model, start);
    torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
    for (const Batch& batch : batches) {
      optimizer.zero_grad();
      model->loss(batch.x, batch.labels).backward();
      optimizer.step();
    }
  }
  TinyNet model;
};

class DataParallelTest : public testing::TestWithParam<int> {};

TEST_P(DataParallelTest, StepsAreThoseOfOneProcess) {
  torch::manual_seed(3);
  const TinyNet start;
  // Unequal slices, and, with four ranks, some of one image and some of none.
  const std::vector<Batch> batches = {random_batch(7), random_batch(3), random_batch(5)};
  const Reference reference(start, batches);
  on_ranks(GetParam(), [&](const Ranks& ranks) {
    TinyNet model;
    if (ranks.is_main()) copy_state(model, start);
    synchronize(model, ranks);
    DataParallel parallel(*model, ranks);
    torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
    for (const Batch& batch : batches) {
      const Batch own = slice(batch, ranks);
      const auto examples = static_cast<double>(own.labels.size(0));
      optimizer.zero_grad();
      const at::Tensor outputs = model->forward(own.x);
      const at::Tensor loss = examples > 0 ? at::cross_entropy_loss(outputs, own.labels) : outputs.sum();
      parallel.backward(loss, examples / static_cast<double>(batch.labels.size(0)));
      optimizer.step();
    }
    for (const auto& wanted : reference.model->named_parameters()) {
      expect_equal(model->named_parameters()[wanted.key()], wanted.value(), wanted.key());
      expect_equal(model->named_parameters()[wanted.key()].grad(), wanted.value().grad(), wanted.key());
    }
    for (const auto& wanted : reference.model->named_buffers())
      expect_equal(model->named_buffers()[wanted.key()].to(torch::kDouble), wanted.value().to(torch::kDouble),
                   wanted.key());
    assert_identical("after training", *model, ranks);
  });
}

INSTANTIATE_TEST_SUITE_P(Ranks, DataParallelTest, testing::Values(1, 2, 4));

TEST(DataParallel, GoesOnAfterSurgery) {
  torch::manual_seed(5);
  const TinyNet start;
  const Batch batch = random_batch(6);
  LayerPlan pruned = LayerPlan::unchanged("conv2", LayerKind::conv2d, 8, 8);
  pruned.kept_in = {0, 2, 3, 7};
  CompressionPlan plan;
  plan.layers = {pruned};
  TinyNetImpl::channel_graph().resolve(plan);
  TinyNet alone;
  copy_state(alone, start);
  cctorch::apply(*alone, plan);
  alone->loss(batch.x, batch.labels).backward();
  on_ranks(2, [&](const Ranks& ranks) {
    TinyNet model;
    copy_state(model, start);
    synchronize(model, ranks);
    {
      const DataParallel before(*model, ranks);
    }
    cctorch::apply(*model, plan);
    assert_identical("surgery", *model, ranks);
    DataParallel parallel(*model, ranks);
    const Batch own = slice(batch, ranks);
    parallel.backward(model->loss(own.x, own.labels), 0.5);
    for (const auto& wanted : alone->named_parameters())
      expect_equal(model->named_parameters()[wanted.key()].grad(), wanted.value().grad(), wanted.key());
  });
}

TEST(AssertIdentical, NamesTheLayerAndTheRank) {
  const TinyNet start;
  on_ranks(3, [&](const Ranks& ranks) {
    TinyNet model;
    copy_state(model, start);
    assert_identical("the start", *model, ranks);
    if (ranks.rank() == 2) {
      const torch::NoGradGuard no_grad;
      model->bn2->running_var[3] += 1e-15;
    }
    std::string message;
    try {
      assert_identical("surgery", *model, ranks);
    } catch (const c10::Error& error) {
      message = error.what_without_backtrace();
    }
    EXPECT_NE(message.find("surgery: 'bn2.running_var' of rank 2 is not that of rank 0"), std::string::npos) << message;
  });
}

TEST(AcrossRanks, MeanGradientsAndReestimationAreThoseOfOneProcess) {
  torch::manual_seed(7);
  const TinyNet start;
  const std::vector<Batch> batches = {random_batch(6), random_batch(4)};
  const auto gradients = [&](TinyNet& model, const Ranks& ranks) {
    const auto specs = collaborative::participants(layer_specs(*model, [&] { model->forward(batches[0].x); }));
    auto next = [&, i = size_t{0}]() mutable -> std::optional<collaborative::BatchLoss> {
      // The first rank has the first batch, the last all others.
      while (i < batches.size() && ranks.count() > 1 && (i == 0) != ranks.is_main()) ++i;
      if (i == batches.size()) return std::nullopt;
      const Batch& batch = batches[i++];
      return collaborative::BatchLoss{model->loss(batch.x, batch.labels), batch.labels.size(0)};
    };
    return collaborative::mean_gradients(*model, specs, next, ranks);
  };
  const auto reestimated = [&](TinyNet& model, const Ranks& ranks) {
    auto next = [&, i = size_t{0}]() mutable {
      if (i == batches.size()) return false;
      model->forward(slice(batches[i++], ranks).x);
      return true;
    };
    reestimate_batch_norm(*model, next, ranks);
  };
  TinyNet alone;
  copy_state(alone, start);
  const auto wanted = gradients(alone, {});
  reestimated(alone, {});
  on_ranks(2, [&](const Ranks& ranks) {
    TinyNet model;
    copy_state(model, start);
    const auto found = gradients(model, ranks);
    ASSERT_EQ(found.size(), wanted.size());
    for (size_t i = 0; i < found.size(); ++i) expect_equal(found[i].gradient, wanted[i].gradient, wanted[i].spec.name);
    reestimated(model, ranks);
    for (const auto& buffer : alone->named_buffers())
      expect_equal(model->named_buffers()[buffer.key()].to(torch::kDouble), buffer.value().to(torch::kDouble),
                   buffer.key());
    EXPECT_EQ(model->bn1->ranks().count(), 1) << "back as it was";
  });
}

}  // namespace
}  // namespace cctorch::distributed
