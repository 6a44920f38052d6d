#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <concepts>
#include <tuple>
#include <utility>
#include <vector>

#include "csrc/ops/cpu/channelwise.h"

// Operators whose formula makes the parameter of a channel (Formula::parameter) from an element of one tensor, or of
// two.
namespace cctorch::cpu::learned_grid {

// function(a zero of the type of x's arithmetic)
template <typename Function>
auto with_math_type(const at::Tensor& x, const Function& function) {
  return x.scalar_type() == at::kDouble ? function(double{}) : function(float{});
}

template <typename Formula, typename T = typename Formula::value_type>
std::vector<T> parameters(const Formula& formula, const at::Tensor& raw) {
  const at::Tensor dense = raw.contiguous();
  const T* from = dense.const_data_ptr<T>();
  std::vector<T> result(dense.numel());
  std::transform(from, from + result.size(), result.begin(), [&](T value) { return formula.parameter(value); });
  return result;
}

template <typename Formula, typename T = typename Formula::value_type>
std::vector<formula::Pair<T>> parameters(const Formula& formula, const at::Tensor& first, const at::Tensor& second) {
  const at::Tensor a = first.contiguous(), b = second.contiguous();
  const T* as = a.const_data_ptr<T>();
  const T* bs = b.const_data_ptr<T>();
  std::vector<formula::Pair<T>> result(a.numel());
  for (size_t i = 0; i < result.size(); ++i) result[i] = formula.parameter({as[i], bs[i]});
  return result;
}

// The formula of every x of a list. `raw` is one list, or two.
template <typename Formula, std::same_as<at::TensorList>... Raw>
std::vector<at::Tensor> forward(const Formula& formula, at::TensorList xs, std::optional<int64_t> axis,
                                const Raw&... raw) {
  std::vector<at::Tensor> ys;
  std::vector<channelwise::Operand<typename Formula::parameter_type>> operands;
  for (size_t i = 0; i < xs.size(); ++i) {
    const at::Tensor& y = ys.emplace_back(at::empty_like(xs[i]));
    if (y.numel() == 0) continue;
    const at::Tensor dense = channelwise::densified(xs[i], y);
    operands.push_back({channelwise::layout(dense, axis), y, dense, parameters(formula, raw[i]...), {}});
  }
  channelwise::forward(formula, operands);
  return ys;
}

template <typename Formula, std::same_as<at::Tensor>... Raw>
at::Tensor forward(const Formula& formula, const at::Tensor& x, std::optional<int64_t> axis, const Raw&... raw) {
  return forward(formula, at::TensorList(x), axis, at::TensorList(raw)...).front();
}

inline void store(const std::vector<double>& sums, double factor, const at::Tensor& to) {
  channelwise::store([&](int64_t i) { return sums[i]; }, to, factor);
}

inline void store(const std::vector<formula::Pair<double>>& sums, double factor, const at::Tensor& first,
                  const at::Tensor& second) {
  channelwise::store([&](int64_t i) { return sums[i].first; }, first, factor);
  channelwise::store([&](int64_t i) { return sums[i].second; }, second, factor);
}

// Lists of the gradients of x, and of `factors` times those of `raw`; no factors are all 1.
template <typename Formula, std::same_as<at::TensorList>... Raw>
auto backward(const Formula& formula, at::TensorList grads, at::TensorList xs, std::optional<int64_t> axis,
              at::ArrayRef<double> factors, const Raw&... raw) {
  using P = typename Formula::parameter_type;
  std::vector<at::Tensor> grads_of_x;
  std::vector<channelwise::Operand<P>> operands;
  for (size_t i = 0; i < xs.size(); ++i) {
    const at::Tensor& grad_x = grads_of_x.emplace_back(at::empty_like(xs[i]));
    if (grad_x.numel() == 0) continue;
    const at::Tensor dense = channelwise::densified(xs[i], grad_x);
    operands.push_back({channelwise::layout(dense, axis), grad_x, dense, parameters(formula, raw[i]...),
                        channelwise::densified(grads[i], grad_x)});
  }
  const auto sums = channelwise::backward(formula, operands);
  const auto empty_for = [](at::TensorList tensors) {
    std::vector<at::Tensor> result;
    for (const at::Tensor& tensor : tensors) {
      result.push_back(at::empty_like(tensor, at::MemoryFormat::Contiguous));
    }
    return result;
  };
  auto results = std::make_tuple(std::move(grads_of_x), empty_for(raw)...);
  auto next = sums.begin();
  for (size_t i = 0; i < xs.size(); ++i) {
    const double factor = factors.empty() ? 1.0 : factors[i];
    std::apply(
        [&](const auto&, const auto&... to) {
          if (xs[i].numel() > 0) {
            store(*next++, factor, to[i]...);
          } else {
            (to[i].zero_(), ...);
          }
        },
        results);
  }
  return results;
}

template <typename Formula, std::same_as<at::Tensor>... Raw>
auto backward(const Formula& formula, const at::Tensor& grad, const at::Tensor& x, std::optional<int64_t> axis,
              double factor, const Raw&... raw) {
  const auto lists = backward(formula, at::TensorList(grad), at::TensorList(x), axis, at::ArrayRef<double>(factor),
                              at::TensorList(raw)...);
  return std::apply([](const auto&... list) { return std::make_tuple(list.front()...); }, lists);
}

}  // namespace cctorch::cpu::learned_grid
