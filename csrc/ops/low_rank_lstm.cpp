#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/stack.h>
#include <cctorch/low_rank.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "csrc/ops/checks.h"
#include "csrc/ops/cudnn_lstm.h"
#include "csrc/ops/lstm_cell.h"

namespace cctorch {
namespace {

constexpr auto op = "low_rank_lstm";

void check_weight(const char* name, at::TensorList weight, const c10::SymInt& outputs, const c10::SymInt& inputs) {
  TORCH_CHECK(weight.size() == 1 || weight.size() == 2, op, ": ", name, " must be a matrix or two factors, got ",
              weight.size(), " tensors");
  for (const at::Tensor& factor : weight) {
    TORCH_CHECK(factor.dim() == 2, op, ": ", name, " must have 2 dimensions, got shape ", factor.sym_sizes());
  }
  TORCH_SYM_CHECK(weight.front().sym_size(1).sym_eq(inputs), op, ": ", name, " must read ", inputs,
                  " features, got shape ", weight.front().sym_sizes());
  TORCH_SYM_CHECK(weight.back().sym_size(0).sym_eq(outputs), op, ": ", name, " must give ", outputs,
                  " features, got shape ", weight.back().sym_sizes());
  if (weight.size() < 2) return;
  TORCH_SYM_CHECK(weight[1].sym_size(1).sym_eq(weight[0].sym_size(0)), op, ": the factors of ", name,
                  " must have one rank, got shapes ", weight[0].sym_sizes(), " and ", weight[1].sym_sizes());
}

void check_bias(const char* name, const std::optional<at::Tensor>& bias, const c10::SymInt& outputs) {
  if (!bias) return;
  TORCH_CHECK(bias->dim() == 1, op, ": ", name, " must be one-dimensional, got shape ", bias->sym_sizes());
  TORCH_SYM_CHECK(bias->sym_size(0).sym_eq(outputs), op, ": ", name, " must have ", outputs, " elements, got ",
                  bias->sym_size(0));
}

void check_states(const at::Tensor& x, const at::Tensor& h, const at::Tensor& c, bool packed) {
  TORCH_CHECK(x.dim() == (packed ? 2 : 3), op, ": x must be ", packed ? "rows x inputs" : "steps x batch x inputs",
              ", got shape ", x.sym_sizes());
  TORCH_CHECK(h.dim() == 2 && c.dim() == 2, op, ": h and c must be batch x features, got shapes ", h.sym_sizes(),
              " and ", c.sym_sizes());
  TORCH_SYM_CHECK(h.sym_size(0).sym_eq(c.sym_size(0)), op, ": h and c must be of one batch, got shapes ", h.sym_sizes(),
                  " and ", c.sym_sizes());
  if (packed) return;
  TORCH_SYM_CHECK(x.sym_size(0).sym_gt(0), op, ": x must have at least one step, got shape ", x.sym_sizes());
  TORCH_SYM_CHECK(x.sym_size(1).sym_eq(h.sym_size(0)), op, ": h must be of the batch of x, ", x.sym_size(1),
                  ", got shape ", h.sym_sizes());
}

std::vector<int64_t> checked_sizes(const at::Tensor& batch_sizes, const at::Tensor& x, const at::Tensor& h) {
  TORCH_CHECK(batch_sizes.is_cpu() && batch_sizes.dim() == 1 && batch_sizes.scalar_type() == at::kLong &&
                  batch_sizes.numel() > 0,
              op, ": batch_sizes must be a list of integers on the CPU, int64, got ", batch_sizes.scalar_type(), " on ",
              batch_sizes.device(), " of shape ", batch_sizes.sizes());
  const at::Tensor dense = batch_sizes.contiguous();
  std::vector<int64_t> sizes(dense.const_data_ptr<int64_t>(), dense.const_data_ptr<int64_t>() + dense.numel());
  int64_t rows = 0;
  for (const int64_t size : sizes) rows += size;
  TORCH_CHECK(sizes.back() > 0 && std::is_sorted(sizes.rbegin(), sizes.rend()), op,
              ": batch_sizes must be positive and not rise, got ", sizes);
  TORCH_CHECK(sizes.front() == h.size(0) && rows == x.size(0), op, ": batch_sizes must begin with the batch of h, ",
              h.size(0), ", and add up to the ", x.size(0), " rows of x, got ", sizes);
  return sizes;
}

at::Tensor product(const at::Tensor& x, at::TensorList weight, const std::optional<at::Tensor>& bias) {
  if (weight.size() == 1) return at::linear(x, weight[0], bias);
  return at::linear(at::linear(x, weight[0]), weight[1], bias);
}

class Cell {
 public:
  Cell(at::Tensor h, at::Tensor c, at::TensorList weight_hh, at::TensorList weight_hr)
      : hidden(std::move(h)), cell(std::move(c)), projection_(weight_hr) {
    for (const at::Tensor& factor : weight_hh) recurrent_.push_back(factor.t());
  }

  void step(const at::Tensor& input) {
    const at::Tensor narrow = recurrent_.size() == 1 ? hidden : at::mm(hidden, recurrent_.front());
    const at::Tensor gates = at::addmm(input, narrow, recurrent_.back());
    std::tie(hidden, cell) = lstm_cell(gates, cell);
    if (!projection_.empty()) hidden = product(hidden, projection_, std::nullopt);
  }

  at::Tensor hidden, cell;

 private:
  std::vector<at::Tensor> recurrent_;  // transposed
  at::TensorList projection_;
};

// The steps of a packed sequence, of examples in order of falling length: those that end leave the batch, or join it in
// reverse.
std::vector<at::Tensor> run_packed(Cell& state, const std::vector<at::Tensor>& steps, bool reverse) {
  std::vector<at::Tensor> outputs(steps.size()), last_h, last_c;
  const at::Tensor h0 = state.hidden, c0 = state.cell;
  if (reverse) {
    state.hidden = h0.narrow(0, 0, 0);
    state.cell = c0.narrow(0, 0, 0);
  }
  for (size_t i = 0; i < steps.size(); ++i) {
    const size_t t = reverse ? steps.size() - 1 - i : i;
    const int64_t present = state.hidden.size(0), wanted = steps[t].size(0);
    if (present < wanted) {
      state.hidden = at::cat({state.hidden, h0.narrow(0, present, wanted - present)});
      state.cell = at::cat({state.cell, c0.narrow(0, present, wanted - present)});
    } else if (present > wanted) {
      last_h.push_back(state.hidden.narrow(0, wanted, present - wanted));
      last_c.push_back(state.cell.narrow(0, wanted, present - wanted));
      state.hidden = state.hidden.narrow(0, 0, wanted);
      state.cell = state.cell.narrow(0, 0, wanted);
    }
    state.step(steps[t]);
    outputs[t] = state.hidden;
  }
  for (const auto& [now, last] : {std::pair{&state.hidden, &last_h}, {&state.cell, &last_c}}) {
    last->push_back(*now);
    std::reverse(last->begin(), last->end());
    *now = at::cat(*last);
  }
  return outputs;
}

std::vector<at::Tensor> run_padded(Cell& state, const std::vector<at::Tensor>& steps, bool reverse) {
  std::vector<at::Tensor> outputs(steps.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    const size_t t = reverse ? steps.size() - 1 - i : i;
    state.step(steps[t]);
    outputs[t] = state.hidden;
  }
  return outputs;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> composite_lstm(
    const at::Tensor& x, const at::Tensor& h, const at::Tensor& c, at::TensorList weight_ih, at::TensorList weight_hh,
    at::TensorList weight_hr, const std::optional<at::Tensor>& bias_ih, const std::optional<at::Tensor>& bias_hh,
    const std::optional<at::Tensor>& batch_sizes, bool reverse) {
  check_states(x, h, c, batch_sizes.has_value());
  const c10::SymInt gates = c.sym_size(1) * 4;
  check_weight("weight_ih", weight_ih, gates, x.sym_size(-1));
  check_weight("weight_hh", weight_hh, gates, h.sym_size(1));
  if (!weight_hr.empty()) {
    check_weight("weight_hr", weight_hr, h.sym_size(1), c.sym_size(1));
  } else {
    TORCH_SYM_CHECK(h.sym_size(1).sym_eq(c.sym_size(1)), op,
                    ": without weight_hr, h and c must have as many features, got shapes ", h.sym_sizes(), " and ",
                    c.sym_sizes());
  }
  check_bias("bias_ih", bias_ih, gates);
  check_bias("bias_hh", bias_hh, gates);
  const auto sizes = batch_sizes ? checked_sizes(*batch_sizes, x, h) : std::vector<int64_t>();
  if (auto found = cudnn_lstm(x, h, c, weight_ih, weight_hh, weight_hr, bias_ih, bias_hh, sizes, reverse)) {
    return *std::move(found);
  }
  const std::optional<at::Tensor> bias = bias_ih && bias_hh ? *bias_ih + *bias_hh : bias_ih ? bias_ih : bias_hh;
  const at::Tensor inputs = product(x, weight_ih, bias);
  // Under autocast the gates are narrower than what was given; PyTorch's LSTM has its states as they are.
  Cell state(h.to(inputs.scalar_type()), c.to(inputs.scalar_type()), weight_hh, weight_hr);
  at::Tensor y;
  if (batch_sizes) {
    y = at::cat(run_packed(state, inputs.split_with_sizes(sizes), reverse));
  } else {
    y = at::stack(run_padded(state, inputs.unbind(0), reverse));
  }
  return {y, state.hidden, state.cell};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> low_rank_lstm(
    const at::Tensor& x, const at::Tensor& h, const at::Tensor& c, at::TensorList weight_ih, at::TensorList weight_hh,
    at::TensorList weight_hr, const std::optional<at::Tensor>& bias_ih, const std::optional<at::Tensor>& bias_hh,
    const std::optional<at::Tensor>& batch_sizes, bool reverse) {
  static const auto handle =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::low_rank_lstm", "").typed<decltype(low_rank_lstm)>();
  return handle.call(x, h, c, weight_ih, weight_hh, weight_hr, bias_ih, bias_hh, batch_sizes, reverse);
}

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  m.def(
      "low_rank_lstm(Tensor x, Tensor h, Tensor c, Tensor[] weight_ih, Tensor[] weight_hh, Tensor[] weight_hr, Tensor? "
      "bias_ih=None, Tensor? bias_hh=None, Tensor? batch_sizes=None, bool reverse=False) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(cctorch, CompositeImplicitAutograd, m) { m.impl("low_rank_lstm", &composite_lstm); }

// torch.vmap has no fallback for lists of tensors; it sees through what the operator is made of.
TORCH_LIBRARY_IMPL(cctorch, FuncTorchBatchedDecomposition, m) { m.impl("low_rank_lstm", &composite_lstm); }

}  // namespace cctorch
