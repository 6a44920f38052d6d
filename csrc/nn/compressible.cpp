#include <ATen/core/Tensor.h>
#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>
#include <cctorch/nn/compressible.h>

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

void Compressible::check(const LayerPlan& plan) const {
  CompressionPlan{.method = "", .target = 0.0, .layers = {plan}}.validate();
  TORCH_CHECK_VALUE(!plan_, "layer '", plan.name,
                    "' is compressed already, expected a dense one: a plan's indices refer to the dense model");
  const LayerSpec found = spec(plan.name);
  TORCH_CHECK_VALUE(
      found.kind == plan.kind && found.in_channels == plan.in_channels && found.out_channels == plan.out_channels,
      "layer '", plan.name, "' is a ", to_string(found.kind), " of ", found.in_channels, " -> ", found.out_channels,
      " channels, but the plan expects a ", to_string(plan.kind), " of ", plan.in_channels, " -> ", plan.out_channels,
      ": it was made for another architecture");
  TORCH_CHECK_VALUE(!plan.mask && !plan.bits, "layer '", plan.name, "': the plan holds ", plan.mask ? "a mask" : "bits",
                    ", which apply() cannot carry out, since it only rebuilds layers: clear it, and use the module ",
                    plan.mask ? "Mask" : "FakeQuant", " on the layer's weight");
  check_structure(plan);
}

void Compressible::compress(const LayerPlan& plan, at::MemoryFormat format) {
  check(plan);
  format_ = format;
  if (!plan.is_unchanged()) carry_out(plan);
}

void Compressible::observe(bool on) {
  observing_ = on;
  if (on) positions_ = 0;
}

}  // namespace cctorch::nn
