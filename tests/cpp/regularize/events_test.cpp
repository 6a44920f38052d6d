#include <ATen/record_function.h>
#include <cctorch/nn/modules.h>
#include <cctorch/regularize.h>
#include <gtest/gtest.h>
#include <torch/nn/functional/loss.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/rnn.h>
#include <torch/optim/sgd.h>

#include <functional>
#include <limits>
#include <memory>
#include <string>

#include "tests/cpp/refusal.h"

namespace cctorch::regularize {
namespace {

std::shared_ptr<Regularizer> pruning() { return std::make_shared<MagnitudePruning>(0.75); }
std::shared_ptr<FrequencySchedule> every(int64_t period) { return std::make_shared<ConstantPeriod>(period); }

int64_t nonzeros(const at::Tensor& weight) { return weight.count_nonzero().item<int64_t>(); }

// The two lines of the README in a loop of the user's own.
TEST(RegularizationEvents, TwoLinesInATrainingLoop) {
  torch::nn::Linear model(8, 4);
  torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));

  RegularizationEvents events(model->named_parameters().pairs(), std::make_shared<MagnitudePruning>(0.75),
                              std::make_shared<ConstantPeriod>(5), {.optimizer = &optimizer});
  std::vector<int64_t> at;
  for (int step = 1; step <= 12; ++step) {
    optimizer.zero_grad();
    model->forward(at::randn({16, 8})).square().mean().backward();
    optimizer.step();
    if (const auto event = events.step()) at.push_back(event->step);
  }
  EXPECT_EQ(at, (std::vector<int64_t>{5, 10}));
  EXPECT_GT(nonzeros(model->weight), 8);
  const auto last = events.finish();
  ASSERT_TRUE(last);
  EXPECT_EQ(last->period, 2);
  EXPECT_EQ(nonzeros(model->weight), 8);
  EXPECT_EQ(last->bits, 8 * 32 + 32);
  EXPECT_EQ(last->dense_bits, 32 * 32);
  EXPECT_FALSE(events.finish());
}

// What cctorch::apply does to an optimizer.
TEST(RegularizationEvents, AParameterThatTheOptimizerNoLongerHasIsRefused) {
  torch::nn::Linear model(8, 4);
  torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(0.1));
  RegularizationEvents events({{"never", at::randn({2, 2}).requires_grad_()}, {"weight", model->weight}}, pruning(),
                              every(1), {.optimizer = &optimizer});
  EXPECT_TRUE(events.step());
  const at::Tensor before = model->weight.detach().normal_().clone();
  optimizer.param_groups()[0].params()[0] = at::randn({3, 8});
  const std::string expected = "the optimizer no longer has 'weight', which it had when the events were made";
  for (const std::function<void()>& act : {std::function<void()>([&] { events.step(); }),
                                           {[&] { events.finish(); }},
                                           {[&] { events.as_if_at_event(); }}}) {
    EXPECT_NE(refusal(act).find(expected), std::string::npos);
  }
  EXPECT_TRUE(at::equal(model->weight, before));
}

TEST(RegularizationEvents, TheStateOfAnotherRegularizerIsRefused) {
  torch::nn::Linear model(8, 4);
  RegularizationEvents pruned(model->named_parameters().pairs(), pruning(), every(1));
  RegularizationEvents noisy(model->named_parameters().pairs(), std::make_shared<UniformNoise>(0.1), every(1));
  EXPECT_NE(refusal([&] {
              noisy.load_state_dict(pruned.state_dict());
            }).find("is of the regularizer MagnitudePruning, expected one of UniformNoise"),
            std::string::npos);
}

TEST(RegularizationEvents, ScalesOfGroupsAreNoWeights) {
  struct Net : torch::nn::Module {
    torch::nn::Linear linear = register_module("linear", torch::nn::Linear(8, 4));
    nn::FakeQuant quant =
        register_module("quant", nn::FakeQuant(nn::FakeQuantOptions(4).axis(0).channels(4).groups(2).offset(true)));
  } model;
  model.quant->initialize(model.linear->weight);
  const at::Tensor scale = model.quant->log_scale.detach().clone(), offset = model.quant->offset.detach().clone();
  for (const auto& q : {pruning(), std::shared_ptr<Regularizer>(std::make_shared<WeightDecay>(0.5))}) {
    q->apply(model.named_parameters().pairs());
    EXPECT_TRUE(at::equal(model.quant->log_scale, scale)) << kind(*q);
    EXPECT_TRUE(at::equal(model.quant->offset, offset)) << kind(*q);
  }
  EXPECT_EQ(nonzeros(model.linear->weight), 8);
  // Of a layer with a weight it is one as any other.
  const NamedParameters own{{"flow.weight", at::ones({2, 2})}, {"flow.log_scale", at::ones({2, 2})}};
  EXPECT_EQ(pruning()->select(own).size(), 2);
}

// Free between events: no operator reaches the dispatcher.
TEST(RegularizationEvents, StepBetweenEventsCallsNoOperator) {
  torch::nn::Linear model(8, 4);
  torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(0.1));
  RegularizationEvents events(model->named_parameters().pairs(), pruning(), std::make_shared<InverseLearningRate>(1.0),
                              {.optimizer = &optimizer});
  static int64_t calls = 0;
  calls = 0;
  const auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback([](const at::RecordFunction&) -> std::unique_ptr<at::ObserverContext> {
        ++calls;
        return nullptr;
      }).scopes({at::RecordScope::FUNCTION}));
  for (int step = 1; step < 10; ++step) EXPECT_FALSE(events.step());
  EXPECT_EQ(calls, 0);
  EXPECT_TRUE(events.step());
  EXPECT_GT(calls, 0);
  at::removeCallback(handle);
}

TEST(RegularizationEvents, TiedParametersActOnceAndFrozenOnesNever) {
  const auto tied = at::randn({8, 8}).requires_grad_();
  const auto frozen = at::randn({8, 8});
  const auto empty = at::empty({0, 8}).requires_grad_();
  const auto before = tied.detach().clone(), frozen_before = frozen.clone();
  RegularizationEvents events({{"a", tied}, {"empty", empty}, {"frozen", frozen}, {"b", tied}},
                              std::make_shared<WeightDecay>(0.5), every(1));
  const auto event = events.step();
  EXPECT_TRUE(tied.equal(before * 0.5));
  EXPECT_TRUE(frozen.equal(frozen_before));
  EXPECT_EQ(event->dense_bits, 64 * 32);
  EXPECT_NEAR(event->relative_update(), 0.5, 1e-6);
}

TEST(RegularizationEvents, AllFrozenIsAnError) {
  const auto weight = at::randn({8, 8});
  const std::string expected = "all parameters that the regularizer acts on are frozen, first of all 'weight'";
  EXPECT_NE(refusal([&] { RegularizationEvents({{"weight", weight}}, pruning(), every(1)); }).find(expected),
            std::string::npos);
  EXPECT_TRUE(RegularizationEvents({{"weight", weight}}, pruning(), every(1), {.include_frozen = true}).step());
  EXPECT_EQ(nonzeros(weight), 16);

  weight.normal_().requires_grad_();
  RegularizationEvents events({{"weight", weight}}, pruning(), every(1));
  weight.set_requires_grad(false);
  const auto before = weight.clone();
  EXPECT_NE(refusal([&] { events.step(); }).find(expected), std::string::npos);
  EXPECT_TRUE(weight.equal(before));
}

TEST(RegularizationEvents, NanNamesTheParameterAndChangesNothing) {
  const auto good = at::randn({8, 8}).requires_grad_();
  const auto bad = at::randn({8, 8}).requires_grad_();
  RegularizationEvents events({{"good", good}, {"layer.bad", bad}}, pruning(), every(2));
  events.step();
  {
    const c10::NoGradGuard no_grad;
    bad[3][4] = std::numeric_limits<float>::quiet_NaN();
  }
  const auto before = good.detach().clone();
  try {
    events.step();
    FAIL() << "expected an error";
  } catch (const c10::ValueError& error) {
    EXPECT_NE(std::string(error.what()).find("'layer.bad'"), std::string::npos) << error.what();
  }
  EXPECT_TRUE(good.equal(before));
  EXPECT_EQ(nonzeros(bad), 64);
}

TEST(RegularizationEvents, AsIfAtEventRestoresBitsAndState) {
  const auto weight = at::randn({16, 8}).requires_grad_();
  RegularizationEvents events({{"w", weight}}, std::make_shared<UniformNoise>(0.1, 7), every(3));
  events.step();
  events.step();
  const auto before = weight.detach().clone();
  at::Tensor inside;
  {
    const auto guard = events.as_if_at_event();
    inside = weight.detach().clone();
    EXPECT_FALSE(inside.equal(before));
    EXPECT_THROW(events.step(), c10::ValueError);
    EXPECT_THROW(AsIfAtEvent{events}, c10::ValueError);
  }
  EXPECT_TRUE(weight.equal(before));
  EXPECT_EQ(events.steps_since_event(), 2);
  events.step();
  EXPECT_TRUE(weight.equal(inside)) << "the event draws the noise that the evaluation saw";
  const auto guard = events.as_if_at_event();
  EXPECT_TRUE(weight.equal(inside)) << "the weights are those of an event already";
}

TEST(RegularizationEvents, AScopeThatWasLeftDoesNotEndTheNextOne) {
  const auto weight = at::randn({16, 8}).requires_grad_();
  RegularizationEvents events({{"w", weight}}, pruning(), every(3));
  const auto before = weight.detach().clone();
  auto first = std::make_unique<AsIfAtEvent>(events);
  first->restore();
  {
    const AsIfAtEvent second(events);
    first.reset();
    EXPECT_FALSE(weight.equal(before));
    EXPECT_THROW(events.step(), c10::ValueError);
  }
  EXPECT_TRUE(weight.equal(before));
}

TEST(RegularizationEvents, ClearsTheMomentumOfWhatItChanges) {
  torch::nn::Linear model(4, 4);
  torch::optim::SGD optimizer(model->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9));
  RegularizationEvents events(model->named_parameters().pairs(), pruning(), every(1),
                              {.optimizer = &optimizer, .clear_momentum = true});
  model->forward(at::randn({16, 4})).square().mean().backward();
  optimizer.step();
  EXPECT_EQ(optimizer.state().size(), 2);
  events.step();
  EXPECT_EQ(optimizer.state().count(model->weight.unsafeGetTensorImpl()), 0);
  EXPECT_EQ(optimizer.state().count(model->bias.unsafeGetTensorImpl()), 1);
}

TEST(RegularizationEvents, LstmMatrices) {
  torch::nn::LSTM model(torch::nn::LSTMOptions(12, 16));
  RegularizationEvents events(model->named_parameters().pairs(), std::make_shared<SVD>(RankOrRatio{.rank = 3}),
                              every(1));
  events.step();
  for (const auto& [name, parameter] : model->named_parameters().pairs()) {
    if (parameter.dim() != 2) continue;
    EXPECT_EQ(at::linalg_matrix_rank(parameter, 1e-5).item<int64_t>(), 3) << name;
  }
}

TEST(RegularizationEvents, RefusesStateOfAnotherScheduleAndKeepsItsOwn) {
  const auto weight = at::randn({4, 4}).requires_grad_();
  RegularizationEvents constant({{"w", weight}}, pruning(), every(3));
  RegularizationEvents adaptive({{"w", weight}}, pruning(), std::make_shared<AdaptivePeriod>(0.01, 2));
  adaptive.step();
  const State before = adaptive.state_dict();
  EXPECT_THROW(adaptive.load_state_dict(constant.state_dict()), c10::ValueError);
  EXPECT_EQ(std::get<int64_t>(adaptive.state_dict().at("steps")), std::get<int64_t>(before.at("steps")));
}

TEST(FrequencySchedule, Periods) {
  const StepwisePeriod stepwise({{0, 10}, {100, 50}});
  EXPECT_EQ(stepwise.period(1, {}), 10);
  EXPECT_EQ(stepwise.period(99, {}), 10);
  EXPECT_EQ(stepwise.period(100, {}), 50);
  const InverseLearningRate inverse(0.2, 1000);
  EXPECT_EQ(inverse.period(1, 0.1), 2);
  EXPECT_EQ(inverse.period(1, 0.01), 20);
  EXPECT_EQ(inverse.period(1, 10.0), 1);
  EXPECT_EQ(inverse.period(1, 0.0), 1000);
  EXPECT_THROW(inverse.period(1, {}), c10::ValueError);
  AdaptivePeriod adaptive(0.001, 5, 400);
  EXPECT_EQ(adaptive.period(1, {}), 5);
  adaptive.record(0.1);
  EXPECT_EQ(adaptive.period(1, {}), 100);
  adaptive.record(0.9);
  EXPECT_EQ(adaptive.period(1, {}), 400);
  adaptive.record(0.0);
  EXPECT_EQ(adaptive.period(1, {}), 5);
}

}  // namespace
}  // namespace cctorch::regularize
