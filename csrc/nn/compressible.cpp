#include <ATen/core/Tensor.h>
#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>
#include <cctorch/nn/compressible.h>

#include "csrc/nn/layer_parts.h"

namespace cctorch::nn {

namespace {

at::Tensor select(const at::Tensor& tensor, int64_t dimension, const std::vector<int64_t>& kept) {
  return tensor.index_select(dimension, at::tensor(kept, at::TensorOptions(tensor.device()).dtype(at::kLong)));
}

}  // namespace

at::Tensor narrow(const at::Tensor& tensor, const LayerPlan& plan) {
  at::Tensor narrowed = select(tensor.detach(), 0, plan.kept_out);
  const bool reads_channels = plan.kind == LayerKind::conv2d || plan.kind == LayerKind::linear;
  if (reads_channels && tensor.dim() >= 2) narrowed = select(narrowed, 1, plan.kept_in);
  return narrowed.contiguous(tensor.suggest_memory_format());
}

void check_architecture(const LayerPlan& plan, const LayerSpec& found) {
  TORCH_CHECK_VALUE(
      found.kind == plan.kind && found.in_channels == plan.in_channels && found.out_channels == plan.out_channels,
      "layer '", plan.name, "' is a ", to_string(found.kind), " of ", found.in_channels, " -> ", found.out_channels,
      " channels, but the plan expects a ", to_string(plan.kind), " of ", plan.in_channels, " -> ", plan.out_channels,
      ": it was made for another architecture");
}

at::Tensor Constraint::operator()(at::Tensor value) const {
  if (!mask.is_empty()) value = mask.ptr()->forward(value);
  if (!quant.is_empty()) value = quant.ptr()->forward(value);
  return value;
}

void Compressible::constrain(const Constraint& constraint) {
  TORCH_CHECK_VALUE(false, "'", constraint.weight, "' is no weight that a mask or bits can act on");
}

void Compressible::bake() {}

void Compressible::check(const LayerPlan& plan) const {
  CompressionPlan{.method = "", .target = 0.0, .layers = {plan}}.validate();
  TORCH_CHECK_VALUE(!plan_, "layer '", plan.name,
                    "' is compressed already, expected a dense one: a plan's indices refer to the dense model");
  check_architecture(plan, spec(plan.name));
  TORCH_CHECK_VALUE(constraints_.empty(), "layer '", plan.name,
                    "' is prepared: its mask and scales are those of the weight as it is; call convert() first");
  check_structure(plan);
}

void Compressible::compress(const LayerPlan& plan, at::MemoryFormat format) {
  check(plan);
  format_ = format;
  if (!plan.keeps_shape()) carry_out(plan);
}

void Compressible::observe(bool on) {
  observing_ = on;
  if (on) positions_ = 0;
}

}  // namespace cctorch::nn
