#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <tuple>
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

template <typename Formula, typename... Raw>
at::Tensor forward(const Formula& formula, const at::Tensor& x, std::optional<int64_t> axis, const Raw&... raw) {
  const at::Tensor y = at::empty_like(x);
  if (x.numel() == 0) return y;
  const at::Tensor dense = channelwise::densified(x, y);
  channelwise::forward(formula, channelwise::layout(dense, axis), y, dense, parameters(formula, raw...).data());
  return y;
}

inline void store(const std::vector<double>& sums, double factor, const at::Tensor& to) {
  channelwise::store([&](int64_t i) { return sums[i]; }, to, factor);
}

inline void store(const std::vector<formula::Pair<double>>& sums, double factor, const at::Tensor& first,
                  const at::Tensor& second) {
  channelwise::store([&](int64_t i) { return sums[i].first; }, first, factor);
  channelwise::store([&](int64_t i) { return sums[i].second; }, second, factor);
}

// The gradients of x, and `factor` times those of `raw`.
template <typename Formula, typename... Raw>
auto backward(const Formula& formula, const at::Tensor& grad, const at::Tensor& x, std::optional<int64_t> axis,
              double factor, const Raw&... raw) {
  auto results = std::make_tuple(at::empty_like(x), at::empty_like(raw, at::MemoryFormat::Contiguous)...);
  const at::Tensor& grad_x = std::get<0>(results);
  std::vector<formula::Wide<typename Formula::parameter_type>> sums(std::get<1>(results).numel());
  if (x.numel() > 0) {
    const at::Tensor dense = channelwise::densified(x, grad_x);
    const at::Tensor dense_grad = channelwise::densified(grad, grad_x);
    sums = channelwise::backward(formula, channelwise::layout(dense, axis), grad_x, dense_grad, dense,
                                 parameters(formula, raw...).data());
  }
  std::apply([&](const at::Tensor&, const auto&... to) { store(sums, factor, to...); }, results);
  return results;
}

}  // namespace cctorch::cpu::learned_grid
