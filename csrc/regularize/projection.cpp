#include "csrc/regularize/projection.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "csrc/regularize/norms.h"
#include "csrc/regularize/rewrite.h"

namespace cctorch::regularize {

namespace {

// Whether two of them share memory. What is done to one in place would then be seen by the other.
bool overlap(at::TensorList tensors) {
  std::vector<std::pair<const char*, const char*>> extents;
  for (const at::Tensor& tensor : tensors) {
    int64_t last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
    const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
    extents.emplace_back(begin, begin + (last + 1) * tensor.element_size());
  }
  std::sort(extents.begin(), extents.end());
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].first < extents[i - 1].second) return true;
  }
  return false;
}

at::Tensor norm_of(std::vector<Weight>& weights, at::TensorList values, std::optional<int64_t> dimension) {
  if (values.empty()) return at::zeros({}, at::kDouble);
  if (!values[0].is_cpu()) return total_norm_on_device(values);
  auto squares = part_squares(values, dimension);
  const at::Tensor norm = total_norm(squares);
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i].squares = std::move(squares[i]);
    weights[i].sliced_dimension = dimension;
  }
  return norm;
}

}  // namespace

std::vector<at::Tensor> Prepared::values() const {
  std::vector<at::Tensor> values;
  for (const Weight& weight : weights) values.push_back(weight.value);
  return values;
}

Prepared prepare(Regularizer& regularizer, const NamedParameters& parameters) {
  const c10::NoGradGuard no_grad;
  Prepared result;
  result.parameters = regularizer.select(parameters);
  for (const auto& [name, parameter] : result.parameters) {
    result.weights.push_back({name, parameter.detach(), Storage::dense(parameter)});
    result.dense_bits += result.weights.back().storage.bits();
  }
  const auto before = result.values();
  result.weight_norm = norm_of(result.weights, before, regularizer.sliced_dimension());
  check_finite(result.weight_norm.item<double>(), "before the event", result.parameters, before);
  if (!result.weights.empty()) regularizer.replace(result.weights);
  const bool alone = before.empty() || !before[0].is_cpu() || !overlap(before);
  for (size_t i = 0; i < before.size(); ++i) {
    Weight& weight = result.weights[i];
    result.bits += weight.storage.bits();
    if (!alone || !weight.value.is_same(before[i])) finish(weight);
  }
  return result;
}

at::Tensor update_norm(const Prepared& prepared) {
  std::vector<at::Tensor> values, parameters;
  for (size_t i = 0; i < prepared.weights.size(); ++i) {
    if (prepared.weights[i].rewrite.size > 0) continue;
    values.push_back(prepared.weights[i].value);
    parameters.push_back(prepared.parameters[i].second.detach());
  }
  return total_distance(values, parameters);
}

double write(const Prepared& prepared) {
  const c10::NoGradGuard no_grad;
  std::vector<at::Tensor> parameters, values;
  for (size_t i = 0; i < prepared.weights.size(); ++i) {
    if (prepared.weights[i].rewrite.size > 0) continue;
    parameters.push_back(prepared.parameters[i].second);
    values.push_back(prepared.weights[i].value);
  }
  if (!values.empty()) at::_foreach_copy_(parameters, values);
  return std::sqrt(rewrite_in_place(prepared.weights, prepared.parameters));
}

}  // namespace cctorch::regularize
