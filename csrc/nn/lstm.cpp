#include <ATen/ops/_cudnn_rnn_flatten_weight.h>
#include <ATen/ops/_use_cudnn_rnn_flatten_weight.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cudnn_is_acceptable.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/lstm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <cctorch/collaborative.h>
#include <cctorch/low_rank.h>
#include <cctorch/nn/factors.h>
#include <cctorch/nn/lstm.h>
#include <torch/nn/init.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <ostream>
#include <utility>

#include "csrc/nn/layer_parts.h"

namespace cctorch::nn {

namespace {

using torch::nn::utils::rnn::PackedSequence;

std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

at::Tensor ordered(const at::Tensor& state, const at::Tensor& order) {
  return order.defined() ? state.index_select(1, order) : state;
}

int64_t outputs_of(const torch::nn::LSTMOptions& options) {
  return options.proj_size() > 0 ? options.proj_size() : options.hidden_size();
}

// cuDNN reads the weights as one piece of memory, and would copy them into one at each call.
void flatten(const std::vector<at::Tensor>& values, const torch::nn::LSTMOptions& options) {
  const at::Tensor& first = values.front();
  if (!first.is_cuda() || !at::cudnn_is_acceptable(first) || !at::_use_cudnn_rnn_flatten_weight()) return;
  if (std::ranges::all_of(values, [&](const at::Tensor& value) { return value.is_alias_of(first); })) return;
  const torch::NoGradGuard no_grad;
  constexpr int64_t lstm = 2;  // cuDNN's CUDNN_LSTM
  const int64_t of_a_place = (options.bias() ? 4 : 2) + (options.proj_size() > 0 ? 1 : 0);
  at::_cudnn_rnn_flatten_weight(values, of_a_place, options.input_size(), lstm, options.hidden_size(),
                                options.proj_size(), options.num_layers(), /*batch_first=*/false,
                                options.bidirectional());
}

void check_options(const torch::nn::LSTMOptions& options) {
  TORCH_CHECK_VALUE(options.input_size() > 0 && options.hidden_size() > 0 && options.num_layers() > 0,
                    "LSTM: input_size = ", options.input_size(), ", hidden_size = ", options.hidden_size(),
                    ", num_layers = ", options.num_layers(), ", expected at least 1 each");
  TORCH_CHECK_VALUE(options.proj_size() >= 0 && options.proj_size() < options.hidden_size(),
                    "LSTM: proj_size = ", options.proj_size(), ", expected 0 or less than hidden_size, ",
                    options.hidden_size());
  TORCH_CHECK_VALUE(options.dropout() >= 0 && options.dropout() <= 1, "LSTM: dropout = ", options.dropout(),
                    ", expected 0 to 1");
}

}  // namespace

LSTMWeight::LSTMWeight(std::string name, int64_t rows, int64_t columns)
    : name_(std::move(name)), rows_(rows), columns_(columns) {}

LayerSpec LSTMWeight::spec(const std::string& name) const {
  return {.name = name,
          .kind = LayerKind::lstm,
          .in_channels = columns_,
          .out_channels = rows_,
          .positions = positions_,
          .bits = 8 * of_->values(name_).front().element_size()};
}

std::vector<std::pair<std::string, at::Tensor>> LSTMWeight::weights() const {
  std::vector<std::pair<std::string, at::Tensor>> found;
  const std::vector<std::string> names = of_->parts(name_);
  const std::vector<at::Tensor> values = of_->values(name_);
  for (size_t i = 0; i < names.size(); ++i) found.emplace_back(names[i], values[i]);
  return found;
}

void LSTMWeight::check_structure(const LayerPlan& plan) const { check_rank(plan, {}); }

void LSTMWeight::carry_out(const LayerPlan& plan) {
  const torch::NoGradGuard no_grad;
  const at::Tensor weight = of_->values(name_).front().detach();
  const auto [first, second] = collaborative::factorize(weight, plan.kept_in, plan.rank.value());
  plan_ = plan;
  of_->factor(name_, first.to(weight.options()).contiguous(), second.to(weight.options()).contiguous());
}

void LSTMWeight::count(int64_t steps) {
  if (observing_) positions_ += steps;
}

LSTMImpl::LSTMImpl(int64_t input_size, int64_t hidden_size)
    : LSTMImpl(torch::nn::LSTMOptions(input_size, hidden_size)) {}

LSTMImpl::LSTMImpl(const torch::nn::LSTMOptions& options_) : options(options_) {
  check_options(options);
  LSTMImpl::reset();
}

void LSTMImpl::reset() {
  const int64_t gates = 4 * options.hidden_size(), directions = options.bidirectional() ? 2 : 1;
  // A clone brings the plans of the weights that it is made from.
  const bool planned = !weights_.empty();
  const auto add = [&](const std::string& name, int64_t rows, int64_t columns) {
    if (!planned) weights_.emplace_back(name, rows, columns);
    const auto& plan = find(name)->plan();
    if (!plan) {
      register_parameter(name, at::empty({rows, columns}));
    } else {
      register_parameter(name + "_first", at::empty({*plan->rank, columns}));
      register_parameter(name + "_second", at::empty({rows, *plan->rank}));
    }
  };
  for (const auto& [layer, suffix] : places()) {
    const int64_t outputs = outputs_of(options);
    add("weight_ih" + suffix, gates, layer == 0 ? options.input_size() : directions * outputs);
    add("weight_hh" + suffix, gates, outputs);
    if (options.bias()) {
      for (const char* const bias : {"bias_ih", "bias_hh"}) register_parameter(bias + suffix, at::empty({gates}));
    }
    if (options.proj_size() > 0) add("weight_hr" + suffix, outputs, options.hidden_size());
  }
  reset_parameters();
}

void LSTMImpl::reset_parameters() {
  const torch::NoGradGuard no_grad;
  const double bound = 1.0 / std::sqrt(static_cast<double>(options.hidden_size()));
  for (const auto& parameter : named_parameters(/*recurse=*/false)) {
    const at::Tensor& value = parameter.value();
    // The product of the factors then has the variance of PyTorch's default.
    const bool second = parameter.key().ends_with("_second");
    const double limit = second ? std::sqrt(3.0 / static_cast<double>(value.size(1))) : bound;
    torch::nn::init::uniform_(value, -limit, limit);
  }
}

void LSTMImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "cctorch::nn::LSTM(input_size=" << options.input_size()
         << ", hidden_size=" << options.hidden_size() << ", num_layers=" << options.num_layers()
         << ", bias=" << options.bias() << ", batch_first=" << options.batch_first()
         << ", dropout=" << options.dropout() << ", bidirectional=" << options.bidirectional();
  if (options.proj_size() > 0) stream << ", proj_size=" << options.proj_size();
  stream << ")";
  const char* before = " compressed to ";
  for (const LSTMWeight& weight : weights_) {
    if (!weight.plan() || !weight.plan()->rank) continue;
    stream << std::exchange(before, ", ") << weight.name_ << " of rank " << *weight.plan()->rank;
  }
}

std::vector<std::pair<std::string, Compressible*>> LSTMImpl::layers() {
  std::vector<std::pair<std::string, Compressible*>> found;
  for (LSTMWeight& weight : weights_) {
    weight.of_ = this;
    found.emplace_back(weight.name_, &weight);
  }
  return found;
}

std::vector<LSTMImpl::Place> LSTMImpl::places() const {
  std::vector<Place> found;
  for (int64_t layer = 0; layer < options.num_layers(); ++layer) {
    const std::string suffix = "_l" + std::to_string(layer);
    found.push_back({layer, suffix});
    if (options.bidirectional()) found.push_back({layer, suffix + "_reverse"});
  }
  return found;
}

const LSTMWeight* LSTMImpl::find(const std::string& weight) const {
  return &*std::ranges::find(weights_, weight, &LSTMWeight::name_);
}

std::vector<std::string> LSTMImpl::parts(const std::string& weight) const {
  if (find(weight)->plan()) return {weight + "_first", weight + "_second"};
  return {weight};
}

std::vector<at::Tensor> LSTMImpl::values(const std::string& weight) const {
  std::vector<at::Tensor> found;
  for (const std::string& part : parts(weight)) found.push_back(parameters_[part]);
  return found;
}

void LSTMImpl::factor(const std::string& weight, const at::Tensor& first, const at::Tensor& second) {
  const torch::OrderedDict<std::string, at::Tensor> before = parameters_;
  parameters_.clear();
  for (const auto& parameter : before) {
    at::Tensor value = parameter.value();
    if (parameter.key() == weight) {
      register_parameter(weight + "_first", first, value.requires_grad());
      register_parameter(weight + "_second", second, value.requires_grad());
    } else {
      // What flatten() made would stay in memory as long as any part of it does.
      if (value.storage().nbytes() > value.nbytes()) value.set_data(value.clone());
      register_parameter(parameter.key(), value, value.requires_grad());
    }
  }
}

bool LSTMImpl::factored() const {
  return std::ranges::any_of(weights_, [](const LSTMWeight& weight) { return weight.plan().has_value(); });
}

void LSTMImpl::check_input(const at::Tensor& x, int64_t dimensions) const {
  TORCH_CHECK_VALUE(x.dim() == dimensions && x.size(-1) == options.input_size(), "LSTM: x has shape ", x.sizes(),
                    ", expected ", dimensions, " dimensions, of which the last has ", options.input_size(),
                    " features");
}

LSTMImpl::States LSTMImpl::checked(const std::optional<States>& states, const at::Tensor& x, int64_t batch) const {
  const auto layers = static_cast<int64_t>(places().size());
  const std::vector<int64_t> h_size = {layers, batch, outputs_of(options)},
                             c_size = {layers, batch, options.hidden_size()};
  if (!states) return {at::zeros(h_size, x.options()), at::zeros(c_size, x.options())};
  const auto& [h, c] = *states;
  TORCH_CHECK_VALUE(h.sizes() == h_size && c.sizes() == c_size, "LSTM: h and c have shapes ", h.sizes(), " and ",
                    c.sizes(), ", expected ", at::IntArrayRef(h_size), " and ", at::IntArrayRef(c_size));
  return *states;
}

std::tuple<at::Tensor, LSTMImpl::States> LSTMImpl::forward(const at::Tensor& x, const std::optional<States>& states) {
  check_input(x, 3);
  const at::Tensor steps = options.batch_first() ? x.transpose(0, 1) : x;
  const auto [y, last] = compute(steps, checked(states, x, steps.size(1)), {});
  return {options.batch_first() ? y.transpose(0, 1) : y, last};
}

std::tuple<PackedSequence, LSTMImpl::States> LSTMImpl::forward_with_packed_input(const PackedSequence& packed,
                                                                                 const std::optional<States>& states) {
  check_input(packed.data(), 2);
  const auto batch = packed.batch_sizes()[0].item<int64_t>();
  const auto [given_h, given_c] = checked(states, packed.data(), batch);
  const at::Tensor &order = packed.sorted_indices(), &back = packed.unsorted_indices();
  const States first = {ordered(given_h, order), ordered(given_c, order)};
  const auto [y, last] = compute(packed.data(), first, packed.batch_sizes());
  const auto& [h, c] = last;
  return {PackedSequence(y, packed.batch_sizes(), order, back), States(ordered(h, back), ordered(c, back))};
}

std::tuple<at::Tensor, LSTMImpl::States> LSTMImpl::compute(const at::Tensor& x, const States& states,
                                                           const at::Tensor& batch_sizes) {
  for (LSTMWeight& weight : weights_) weight.count(batch_sizes.defined() ? batch_sizes.size(0) : x.size(0));
  auto found = factored() ? low_rank(x, states, batch_sizes) : dense(x, states, batch_sizes);
  for (LSTMWeight& weight : weights_) {
    if (weight.watcher_ != nullptr) weight.watcher_->gives(weight, x, std::get<0>(found));
  }
  return found;
}

std::tuple<at::Tensor, LSTMImpl::States> LSTMImpl::dense(const at::Tensor& x, const States& states,
                                                         const at::Tensor& batch_sizes) const {
  const auto& [h, c] = states;
  const std::vector<at::Tensor> values = parameters(/*recurse=*/false), both = {h, c};
  flatten(values, options);
  const auto [y, last_h, last_c] =
      batch_sizes.defined() ? at::lstm(x, batch_sizes, both, values, options.bias(), options.num_layers(),
                                       options.dropout(), is_training(), options.bidirectional())
                            : at::lstm(x, both, values, options.bias(), options.num_layers(), options.dropout(),
                                       is_training(), options.bidirectional(), /*batch_first=*/false);
  return {y, States(last_h, last_c)};
}

std::tuple<at::Tensor, LSTMImpl::States> LSTMImpl::low_rank(const at::Tensor& x, const States& states,
                                                            const at::Tensor& batch_sizes) const {
  const auto& [h, c] = states;
  at::Tensor read = x;
  std::vector<at::Tensor> outputs, last_h, last_c;
  for (const auto& [layer, suffix] : places()) {
    const auto place = static_cast<int64_t>(last_h.size());
    const auto bias = [&](const char* name) {
      return options.bias() ? optional(parameters_[name + suffix]) : std::nullopt;
    };
    const std::vector<at::Tensor> projection =
        options.proj_size() > 0 ? values("weight_hr" + suffix) : std::vector<at::Tensor>();
    const bool reverse = suffix.ends_with("_reverse");
    auto [y, to_h, to_c] =
        low_rank_lstm(read, h[place], c[place], values("weight_ih" + suffix), values("weight_hh" + suffix), projection,
                      bias("bias_ih"), bias("bias_hh"), optional(batch_sizes), reverse);
    last_h.push_back(to_h);
    last_c.push_back(to_c);
    outputs.push_back(y);
    if (reverse != options.bidirectional()) continue;  // the other direction reads the same
    read = at::cat(std::exchange(outputs, {}), -1);
    if (layer + 1 < options.num_layers()) read = at::dropout(read, options.dropout(), is_training());
  }
  return {read, States(at::stack(last_h), at::stack(last_c))};
}

}  // namespace cctorch::nn
