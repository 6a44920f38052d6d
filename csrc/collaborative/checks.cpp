#include "csrc/collaborative/checks.h"

#include <ATen/ATen.h>

#include <cmath>
#include <utility>

namespace cctorch::collaborative {

void check_options(const Options& options) {
  TORCH_CHECK_VALUE(options.target > 0 && options.target < 1, "compress: target = ", options.target,
                    ", expected a fraction of the budget to remove, above 0 and below 1");
  TORCH_CHECK_VALUE(options.gamma >= 0, "compress: gamma = ", options.gamma, ", expected at least 0");
  TORCH_CHECK_VALUE(options.step_fraction > 0 && options.step_fraction <= 1,
                    "compress: step_fraction = ", options.step_fraction, ", expected above 0 and at most 1");
  TORCH_CHECK_VALUE(options.max_rate > 0 && options.max_rate < 1, "compress: max_rate = ", options.max_rate,
                    ", expected above 0 and below 1");
  TORCH_CHECK_VALUE(options.multiple >= 1, "compress: multiple = ", options.multiple, ", expected at least 1");
  TORCH_CHECK_VALUE(options.layout != LowRankLayout::tucker,
                    "compress: layout = tucker, expected channel or spatial: singular values are those of a matrix");
  TORCH_CHECK_VALUE(options.effort > 0, "compress: effort = ", options.effort, ", expected more than 0");
}

void check_layer(const Layer& layer, const Options& options) {
  const LayerSpec& spec = layer.spec;
  const bool convolution = spec.kind == LayerKind::conv2d && layer.weight.dim() == 4;
  const bool lstm = spec.kind == LayerKind::lstm;
  const bool matrix = (spec.kind == LayerKind::linear || lstm) && layer.weight.dim() == 2;
  TORCH_CHECK_VALUE(convolution || matrix, "compress: layer '", spec.name, "' is a ", to_string(spec.kind),
                    " with a weight of ", layer.weight.dim(),
                    " dimensions, expected a conv2d with 4, or a linear layer or lstm with 2");
  TORCH_CHECK_VALUE(!lstm || options.units != Units::channels, "compress: layer '", spec.name,
                    "' is a weight of an lstm, of which singular values alone can go: units = channels leaves it out");
  TORCH_CHECK_VALUE(spec.groups == 1, "compress: layer '", spec.name, "' has ", spec.groups,
                    " groups, expected 1; leave grouped convolutions out");
  TORCH_CHECK_VALUE(spec.bits >= 1 && spec.bits <= 64, "compress: layer '", spec.name, "': bits = ", spec.bits,
                    ", expected 1 to 64 for each weight");
  TORCH_CHECK_VALUE(layer.max_rate >= 0 && layer.max_rate <= 1, "compress: layer '", spec.name,
                    "': max_rate = ", layer.max_rate, ", expected 0 to 1");
  for (const auto& [what, value] :
       {std::pair{"importance", layer.importance}, {"lost", layer.lost}, {"cost_before", layer.cost_before}}) {
    TORCH_CHECK_VALUE(std::isfinite(value) && value >= 0, "compress: layer '", spec.name, "': ", what, " = ", value,
                      ", expected a finite number of at least 0");
  }
  TORCH_CHECK_VALUE(layer.weight.size(0) == spec.out_channels && layer.weight.size(1) == spec.in_channels &&
                        layer.weight.numel() == spec.parameters() && spec.positions > 0 &&
                        (!convolution || layer.weight.size(2) == spec.kernel_height),
                    "compress: layer '", spec.name, "' has a weight of shape ", layer.weight.sizes(), ", expected ",
                    spec.out_channels, " x ", spec.in_channels, " and a kernel of ", spec.kernel_height, " x ",
                    spec.kernel_width);
  TORCH_CHECK_VALUE(layer.gradient.defined() && layer.gradient.sizes() == layer.weight.sizes(), "compress: layer '",
                    spec.name, "': the gradient's shape differs from the weight's, ", layer.weight.sizes());
  for (const auto& [what, tensor] : {std::pair{"weight", &layer.weight}, {"gradient", &layer.gradient}}) {
    const int64_t bad = tensor->numel() - at::isfinite(*tensor).sum().item<int64_t>();
    TORCH_CHECK_VALUE(bad == 0, "compress: layer '", spec.name, "': ", bad, " of ", tensor->numel(), " ", what,
                      " elements are NaN or infinite; was the model trained with too high a learning rate?");
  }
}

Options of_layer(const LayerSpec& spec, const Options& options) {
  Options own = options;
  if (spec.kind == LayerKind::lstm) own.units = Units::singular_values;
  return own;
}

}  // namespace cctorch::collaborative
