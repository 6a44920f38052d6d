#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <cctorch/regularize.h>
#include <torch/optim/optimizer.h>

#include <cmath>
#include <unordered_set>

#include "csrc/regularize/projection.h"
#include "csrc/regularize/state.h"

namespace cctorch::regularize {

namespace {

std::unordered_set<const c10::TensorImpl*> tensors_of(torch::optim::Optimizer& optimizer) {
  std::unordered_set<const c10::TensorImpl*> tensors;
  for (const auto& group : optimizer.param_groups())
    for (const at::Tensor& parameter : group.params()) tensors.insert(parameter.unsafeGetTensorImpl());
  return tensors;
}

}  // namespace

RegularizationEvents::RegularizationEvents(NamedParameters parameters, std::shared_ptr<Regularizer> regularizer,
                                           std::shared_ptr<FrequencySchedule> schedule, EventOptions options)
    : parameters_(std::move(parameters)),
      regularizer_(std::move(regularizer)),
      schedule_(std::move(schedule)),
      options_(options) {
  TORCH_CHECK_VALUE(regularizer_ && schedule_, "RegularizationEvents: expected a regularizer and a schedule, got null");
  TORCH_CHECK_VALUE(!options_.clear_momentum || options_.optimizer,
                    "RegularizationEvents: clear_momentum = true needs the optimizer: pass it");
  TORCH_CHECK_VALUE(!regularizer_->select(parameters_).empty(),
                    "RegularizationEvents: the regularizer acts on none of the ", parameters_.size(),
                    " parameters; all but weight decay and noise act on those of two or more dimensions");
  active();
  if (!options_.optimizer) return;
  const auto tensors = tensors_of(*options_.optimizer);
  for (const auto& entry : parameters_)
    if (tensors.contains(entry.second.unsafeGetTensorImpl())) optimized_.push_back(entry);
}

void RegularizationEvents::expect_in_optimizer() const {
  if (!options_.optimizer) return;
  const auto tensors = tensors_of(*options_.optimizer);
  for (const auto& [name, parameter] : optimized_) {
    TORCH_CHECK_VALUE(tensors.contains(parameter.unsafeGetTensorImpl()),
                      "RegularizationEvents: the optimizer no longer "
                      "has '",
                      name,
                      "', which it had when the events were made: the model has been rebuilt. Make new "
                      "events of its parameters, behind cctorch::apply");
  }
}

bool RegularizationEvents::due(std::optional<double> lr) const {
  if (!lr && options_.optimizer) lr = options_.optimizer->param_groups().front().options().get_lr();
  return since_event_ + 1 >= schedule_->period(steps_ + 1, lr);
}

std::optional<Event> RegularizationEvents::step(std::optional<double> lr) {
  TORCH_CHECK_VALUE(!swapped_,
                    "RegularizationEvents: step within as_if_at_event, where the weights are Q(w); leave it "
                    "before training goes on");
  const bool with_event = due(lr);
  ++steps_;
  ++since_event_;
  if (!with_event) return std::nullopt;
  return run_event();
}

std::optional<Event> RegularizationEvents::finish() {
  TORCH_CHECK_VALUE(!swapped_, "RegularizationEvents: finish within as_if_at_event; leave it first");
  if (at_event()) return std::nullopt;
  return run_event();
}

NamedParameters RegularizationEvents::active() const {
  NamedParameters active;
  for (const auto& entry : parameters_) {
    if (options_.include_frozen || entry.second.requires_grad()) active.push_back(entry);
  }
  TORCH_CHECK_VALUE(!regularizer_->select(active).empty(),
                    "RegularizationEvents: all parameters that the regularizer acts on are frozen, first of all '",
                    regularizer_->select(parameters_).front().first,
                    "': let one of them require a gradient, or pass include_frozen = true");
  return active;
}

Event RegularizationEvents::run_event() {
  expect_in_optimizer();
  const Prepared prepared = prepare(*regularizer_, active());
  // Read together: a device is waited for once.
  const at::Tensor norms = at::stack({update_norm(prepared), prepared.weight_norm}).cpu();
  const auto* norm = norms.const_data_ptr<double>();
  check_finite(norm[0], "in Q(w)", prepared.parameters, prepared.values());
  const double update = std::hypot(norm[0], write(prepared));
  const Event event{steps_, since_event_, update, norm[1], prepared.bits, prepared.dense_bits};
  since_event_ = 0;
  ++events_;
  schedule_->record(event.relative_update());
  if (options_.clear_momentum) {
    for (const auto& [name, parameter] : prepared.parameters) {
      options_.optimizer->state().erase(parameter.unsafeGetTensorImpl());
    }
  }
  return event;
}

State RegularizationEvents::state_dict() const {
  State state{{"steps", steps_}, {"since_event", since_event_}, {"events", events_}};
  insert(state, "schedule.", schedule_->state_dict());
  insert(state, "regularizer", *regularizer_);
  return state;
}

void RegularizationEvents::load(const State& state) {
  const auto steps = read<int64_t>(state, "steps");
  const auto since_event = read<int64_t>(state, "since_event");
  const auto events = read<int64_t>(state, "events");
  TORCH_CHECK_VALUE(0 <= since_event && since_event <= steps && events >= 0,
                    "regularize: the state has steps = ", steps, ", since_event = ", since_event,
                    " and events = ", events, ", expected 0 <= since_event <= steps and events >= 0");
  schedule_->load_state_dict(extract(state, "schedule."));
  restore(state, "regularizer", *regularizer_);
  steps_ = steps;
  since_event_ = since_event;
  events_ = events;
}

void RegularizationEvents::load_state_dict(const State& state) {
  const State before = state_dict();
  try {
    load(state);
  } catch (...) {
    load(before);
    throw;
  }
}

AsIfAtEvent::AsIfAtEvent(RegularizationEvents& events) : events_(events) {
  TORCH_CHECK_VALUE(!events.swapped_, "RegularizationEvents: as_if_at_event within another one; leave that first");
  events.expect_in_optimizer();
  Regularizer& regularizer = *events.regularizer_;
  const State before = regularizer.state_dict();
  const Prepared prepared = prepare(regularizer, events.active());
  regularizer.load_state_dict(before);
  bits_ = prepared.bits;
  if (!events.at_event()) {
    for (const auto& [name, parameter] : prepared.parameters) {
      parameters_.push_back(parameter);
      originals_.push_back(parameter.detach().clone());
    }
    write(prepared);
  }
  inside_ = events.swapped_ = true;
}

AsIfAtEvent::~AsIfAtEvent() {
  try {
    restore();
  } catch (const std::exception& error) {
    TORCH_WARN("as_if_at_event could not restore the weights: ", error.what());
  }
}

void AsIfAtEvent::restore() {
  if (!inside_) return;
  const c10::NoGradGuard no_grad;
  if (!parameters_.empty()) at::_foreach_copy_(parameters_, originals_);
  parameters_.clear();
  originals_.clear();
  inside_ = events_.swapped_ = false;
}

}  // namespace cctorch::regularize
