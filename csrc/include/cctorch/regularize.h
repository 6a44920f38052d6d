#pragma once

#include <cctorch/regularizers.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace torch::optim {
class Optimizer;
}

// Modulated regularization frequency (Lee et al. 2021, arXiv 2105.01875): plain training on dense weights, and once in
// `period` mini-batches w <- Q(w).
//
//   auto events = RegularizationEvents(model->named_parameters().pairs(), std::make_shared<MagnitudePruning>(0.9),
//                                      std::make_shared<ConstantPeriod>(200), {.optimizer = &optimizer});
//   ... optimizer.step(); events.step();
namespace cctorch::regularize {

// When: an event is due as soon as the steps since the last one reach the period in force.
class FrequencySchedule {
 public:
  virtual ~FrequencySchedule() = default;

  // `step` counts the optimizer's steps, this one included; `lr` is absent where the caller does not know it.
  virtual int64_t period(int64_t step, std::optional<double> lr) const = 0;

  // After each event, with ||Q(w) - w|| / ||w||.
  virtual void record(double /*relative_update*/) {}

  virtual State state_dict() const { return {}; }
  virtual void load_state_dict(const State&) {}
};

class ConstantPeriod final : public FrequencySchedule {
 public:
  explicit ConstantPeriod(int64_t period);
  int64_t period(int64_t, std::optional<double>) const override { return period_; }

 private:
  int64_t period_;
};

// (step, period): that period from that step on. The first step is 0; steps ascend.
class StepwisePeriod final : public FrequencySchedule {
 public:
  explicit StepwisePeriod(std::vector<std::pair<int64_t, int64_t>> periods);
  int64_t period(int64_t step, std::optional<double>) const override;

 private:
  std::vector<std::pair<int64_t, int64_t>> periods_;
};

// max(1, round(product / lr)), at most `maximum`: as many units of learning rate between any two events.
class InverseLearningRate final : public FrequencySchedule {
 public:
  explicit InverseLearningRate(double product, int64_t maximum = 5000);
  int64_t period(int64_t, std::optional<double> lr) const override;

 private:
  double product_;
  int64_t maximum_;
};

// round(u / strength) within [minimum, maximum], where u = ||Q(w) - w|| / ||w|| of the last event: holds the update per
// mini-batch at `strength`. Starts with `minimum`.
class AdaptivePeriod final : public FrequencySchedule {
 public:
  explicit AdaptivePeriod(double strength, int64_t minimum = 1, int64_t maximum = 5000);
  int64_t period(int64_t, std::optional<double>) const override { return period_; }
  void record(double relative_update) override;
  State state_dict() const override;
  void load_state_dict(const State& state) override;

 private:
  double strength_;
  int64_t minimum_, maximum_, period_;
};

struct Event {
  int64_t step = 0;    // optimizer steps so far
  int64_t period = 0;  // of those, since the event before
  double update_norm = 0.0;
  double weight_norm = 0.0;
  int64_t bits = 0;
  int64_t dense_bits = 0;

  double relative_update() const { return weight_norm > 0 ? update_norm / weight_norm : 0.0; }
};

struct EventOptions {
  // For the learning rate (of its first group) and clear_momentum; and an event is refused where the optimizer no
  // longer has one of the parameters that it had when the events were made, as after cctorch::apply.
  torch::optim::Optimizer* optimizer = nullptr;
  bool clear_momentum = false;  // after an event: the optimizer forgets its state of the parameters Q acts on
  // Also parameters without requires_grad at the time of the event. Without it, a Q all of whose parameters are frozen,
  // then or when the events are made, is an error.
  bool include_frozen = false;
};

class RegularizationEvents;

// While it lives, the parameters are Q(w). Then they are what they were, to the bit; no state has changed.
class AsIfAtEvent {
 public:
  explicit AsIfAtEvent(RegularizationEvents& events);
  ~AsIfAtEvent();
  AsIfAtEvent(const AsIfAtEvent&) = delete;
  AsIfAtEvent& operator=(const AsIfAtEvent&) = delete;
  void restore();
  int64_t bits() const { return bits_; }  // compressed size

 private:
  RegularizationEvents& events_;
  std::vector<at::Tensor> parameters_, originals_;
  int64_t bits_ = 0;
  bool inside_ = false;
};

// Ties a Q and a schedule to a training loop: call step() after every optimizer step and finish() at the end. Between
// events a step compares two integers and touches no tensor.
class RegularizationEvents {
 public:
  // Throws c10::ValueError where Q acts on none of the parameters, all that it acts on are frozen, or one does not fit.
  RegularizationEvents(NamedParameters parameters, std::shared_ptr<Regularizer> regularizer,
                       std::shared_ptr<FrequencySchedule> schedule, EventOptions options = {});

  // Counts a step. Where an event is due: w <- Q(w). Throws c10::ValueError naming the first parameter that is NaN or
  // infinite, that the optimizer no longer has, or that is frozen as all the others are; the weights are then as they
  // were.
  std::optional<Event> step(std::optional<double> lr = std::nullopt);

  // Whether the next step has an event.
  bool due(std::optional<double> lr = std::nullopt) const;

  // An event now, unless the last step was one: the model ends in compressed form.
  std::optional<Event> finish();

  // For evaluation between events. Q is not applied where the last step was an event. step() throws meanwhile.
  AsIfAtEvent as_if_at_event() { return AsIfAtEvent(*this); }

  int64_t steps() const { return steps_; }
  int64_t steps_since_event() const { return since_event_; }
  int64_t events() const { return events_; }

  State state_dict() const;
  // Throws c10::ValueError naming the entry that is missing or of another type, or both regularizers where another one
  // saved it; nothing has changed then.
  void load_state_dict(const State& state);

 private:
  friend class AsIfAtEvent;
  NamedParameters active() const;
  void expect_in_optimizer() const;
  bool at_event() const { return events_ > 0 && since_event_ == 0; }
  Event run_event();
  void load(const State& state);

  NamedParameters parameters_, optimized_;  // those that the optimizer had
  std::shared_ptr<Regularizer> regularizer_;
  std::shared_ptr<FrequencySchedule> schedule_;
  EventOptions options_;
  int64_t steps_ = 0, since_event_ = 0, events_ = 0;
  bool swapped_ = false;
};

}  // namespace cctorch::regularize
