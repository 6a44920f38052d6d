#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/util/Type.h>
#include <cctorch/regularizers.h>

#include <cmath>
#include <map>
#include <set>
#include <typeinfo>

#include "csrc/regularize/projection.h"
#include "csrc/regularize/rewrite.h"

namespace cctorch::regularize {

namespace {

// The parameters of quantizers, which in groups have two dimensions as weights have. A module's name is all before the
// last dot: one whose parameters are a log_scale, or that and an offset, is a FakeQuant.
class Quantizers {
 public:
  explicit Quantizers(const NamedParameters& parameters) {
    for (const auto& [name, parameter] : parameters) {
      const auto [module, own] = split(name);
      if (own == "log_scale") with_scale_.insert(module);
      if (own != "log_scale" && own != "offset") with_others_.insert(module);
    }
  }
  bool own(const std::string& name) const {
    const auto module = split(name).first;
    return with_scale_.contains(module) && !with_others_.contains(module);
  }

 private:
  static std::pair<std::string, std::string> split(const std::string& name) {
    const size_t own = name.rfind('.') + 1;  // 0 where there is none
    return {name.substr(0, own), name.substr(own)};
  }
  std::set<std::string> with_scale_, with_others_;
};

}  // namespace

std::string kind(const Regularizer& regularizer) {
  const std::string name = c10::demangle(typeid(regularizer).name());
  return name.substr(name.rfind(':') + 1);
}

Storage Storage::dense(const at::Tensor& parameter) {
  return {.values = parameter.numel(), .bits_per_value = 8 * parameter.element_size()};
}

void check_finite(double norm, const char* what, const NamedParameters& parameters, at::TensorList tensors) {
  if (std::isfinite(norm)) return;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t bad = tensors[i].numel() - at::isfinite(tensors[i]).sum().item<int64_t>();
    TORCH_CHECK_VALUE(bad == 0, "regularize: parameter '", parameters[i].first, "' has ", bad, " of ",
                      tensors[i].numel(), " elements NaN or infinite ", what,
                      ", nothing was changed; lower the learning rate or clip the gradients, and go on from an earlier "
                      "checkpoint");
  }
  TORCH_CHECK_VALUE(false, "regularize: the parameters' norm is ", norm, " ", what, ", expected a finite number");
}

NamedParameters Regularizer::select(const NamedParameters& parameters) const {
  NamedParameters selected;
  std::map<const void*, size_t> seen;
  const Quantizers quantizers(parameters);
  for (const auto& [name, parameter] : parameters) {
    TORCH_CHECK_VALUE(parameter.defined(), "regularize: parameter '", name, "' is undefined, expected a tensor");
    if (parameter.numel() == 0 || !acts_on(parameter) || quantizers.own(name)) continue;
    const auto [tied, is_new] = seen.emplace(parameter.const_data_ptr(), selected.size());
    if (!is_new) {
      const auto& [first_name, first] = selected[tied->second];
      TORCH_CHECK_VALUE(first.numel() == parameter.numel(), "regularize: parameters '", first_name, "' and '", name,
                        "' share memory but have ", first.numel(), " and ", parameter.numel(),
                        " elements; leave one of them out");
      continue;
    }
    const auto type = parameter.scalar_type();
    TORCH_CHECK_VALUE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16,
                      "regularize: parameter '", name, "' is ", type,
                      ", expected float32, float64, float16 or bfloat16; leave it out");
    if (!selected.empty()) {
      const auto& [first_name, first] = selected.front();
      TORCH_CHECK_VALUE(parameter.device() == first.device(), "regularize: parameter '", name, "' is on ",
                        parameter.device(), " but '", first_name, "' is on ", first.device(),
                        "; make one set of events for each device");
    }
    selected.emplace_back(name, parameter);
  }
  check_shapes(selected);
  return selected;
}

Projection Regularizer::project(const NamedParameters& parameters) {
  Prepared prepared = prepare(*this, parameters);
  std::vector<Storage> storages;
  for (Weight& weight : prepared.weights) {
    finish(weight);
    storages.push_back(weight.storage);
  }
  return {prepared.parameters,  prepared.values(), std::move(storages),
          prepared.weight_norm, prepared.bits,     prepared.dense_bits};
}

Outcome Regularizer::apply(const NamedParameters& parameters) {
  const Prepared prepared = prepare(*this, parameters);
  at::Tensor update = update_norm(prepared);
  const double rewritten = write(prepared);
  if (rewritten > 0) update = at::hypot(update, at::scalar_tensor(rewritten, update.options()));
  return {update, prepared.weight_norm, prepared.bits, prepared.dense_bits};
}

}  // namespace cctorch::regularize
