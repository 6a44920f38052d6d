#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <cctorch/collaborative.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <numeric>

#include "csrc/collaborative/heuristic.h"
#include "csrc/collaborative/rate.h"
#include "csrc/collaborative/running_layer.h"

namespace cctorch::collaborative {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

void check_options(const Options& options) {
  TORCH_CHECK_VALUE(options.target > 0 && options.target < 1, "compress: target = ", options.target,
                    ", expected a fraction of multiply-accumulates to remove, above 0 and below 1");
  TORCH_CHECK_VALUE(options.gamma >= 0, "compress: gamma = ", options.gamma, ", expected at least 0");
  TORCH_CHECK_VALUE(options.step_fraction > 0 && options.step_fraction <= 1,
                    "compress: step_fraction = ", options.step_fraction, ", expected above 0 and at most 1");
  TORCH_CHECK_VALUE(options.max_rate > 0 && options.max_rate < 1, "compress: max_rate = ", options.max_rate,
                    ", expected above 0 and below 1");
}

void check_layer(const Layer& layer) {
  const LayerSpec& spec = layer.spec;
  const bool convolution = spec.kind == LayerKind::conv2d && layer.weight.dim() == 4;
  const bool linear = spec.kind == LayerKind::linear && layer.weight.dim() == 2;
  TORCH_CHECK_VALUE(convolution || linear, "compress: layer '", spec.name, "' is a ", to_string(spec.kind),
                    " with a weight of ", layer.weight.dim(),
                    " dimensions, expected a conv2d with 4 or a linear layer with 2");
  TORCH_CHECK_VALUE(spec.groups == 1, "compress: layer '", spec.name, "' has ", spec.groups,
                    " groups, expected 1; leave grouped convolutions out");
  TORCH_CHECK_VALUE(layer.weight.size(0) == spec.out_channels && layer.weight.size(1) == spec.in_channels &&
                        layer.weight.numel() == spec.parameters() && spec.positions > 0,
                    "compress: layer '", spec.name, "' has a weight of shape ", layer.weight.sizes(), ", expected ",
                    spec.out_channels, " x ", spec.in_channels, " and a kernel of ", spec.kernel_size());
  TORCH_CHECK_VALUE(layer.gradient.defined() && layer.gradient.sizes() == layer.weight.sizes(), "compress: layer '",
                    spec.name, "': the gradient's shape differs from the weight's, ", layer.weight.sizes());
  for (const auto& [what, tensor] : {std::pair{"weight", &layer.weight}, {"gradient", &layer.gradient}}) {
    const int64_t bad = tensor->numel() - at::isfinite(*tensor).sum().item<int64_t>();
    TORCH_CHECK_VALUE(bad == 0, "compress: layer '", spec.name, "': ", bad, " of ", tensor->numel(), " ", what,
                      " elements are NaN or infinite; was the model trained with too high a learning rate?");
  }
}

// Layers are independent: each thread takes the next one, the largest first, so that no thread is left with the last.
template <class Function>
void for_each_layer(const std::vector<Layer>& layers, std::string_view stage, const Progress& progress,
                    const Function& function) {
  std::vector<size_t> order(layers.size());
  std::iota(order.begin(), order.end(), 0);
  const auto cost = [&](size_t l) {
    const LayerSpec& spec = layers[l].spec;
    return spec.parameters() * std::min(spec.out_channels, spec.in_channels * spec.kernel_size()) *
           (spec.in_channels + spec.out_channels);
  };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return cost(a) > cost(b); });

  std::atomic<size_t> next{0};
  std::mutex report;
  int64_t done = 0;
  const auto total = static_cast<int64_t>(layers.size());
  if (progress) progress(stage, 0, total);
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), total), 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView without_autograd;
    for (int64_t worker = begin; worker < end; ++worker) {
      try {
        for (size_t taken = next++; taken < order.size(); taken = next++) {
          function(order[taken]);
          const std::lock_guard lock(report);
          if (progress) progress(stage, ++done, total);
        }
      } catch (...) {
        next = order.size();
        throw;
      }
    }
  });
}

}  // namespace

std::vector<LayerSpec> participants(const std::vector<LayerSpec>& specs) {
  const auto first = std::find_if(specs.begin(), specs.end(), [](const LayerSpec& spec) {
    return spec.kind == LayerKind::conv2d || spec.kind == LayerKind::depthwise_conv2d;
  });
  const auto last =
      std::find_if(specs.rbegin(), specs.rend(), [](const LayerSpec& spec) { return spec.kind == LayerKind::linear; });
  std::vector<LayerSpec> chosen;
  for (const LayerSpec& spec : specs) {
    const bool weighted = (spec.kind == LayerKind::conv2d && spec.groups == 1) || spec.kind == LayerKind::linear;
    const bool is_first = first != specs.end() && &spec == &*first;
    const bool is_last = last != specs.rend() && &spec == &*last;
    if (weighted && !is_first && !is_last) chosen.push_back(spec);
  }
  return chosen;
}

Solution solve(const std::vector<Layer>& layers, int64_t model_macs, const Options& options, const Progress& progress) {
  check_options(options);
  TORCH_CHECK_VALUE(!layers.empty(), "compress: the model has no layer that can be compressed");
  std::vector<LayerSpec> specs;
  for (const Layer& layer : layers) {
    check_layer(layer);
    specs.push_back(layer.spec);
  }
  TORCH_CHECK_VALUE(model_macs >= dense_macs(specs), "compress: model_macs = ", model_macs,
                    ", but the layers alone have ", dense_macs(specs));

  Solution solution;
  solution.plan.method = "collaborative";
  solution.plan.target = options.target;
  solution.curves.resize(layers.size());
  solution.plan.layers.resize(layers.size());

  auto start = Clock::now();
  for_each_layer(layers, "rate optimization", progress,
                 [&](size_t l) { solution.curves[l] = rate_curve(layers[l], options.units); });
  for (const RateCurve& curve : solution.curves) {
    if (curve.b > 0) continue;
    solution.warnings.push_back("layer '" + curve.name + "' is left alone: the loss does not respond to its weights");
  }
  solution.lambda = allocate(solution.curves, specs, model_macs, options);
  solution.curve_seconds = seconds_since(start);

  start = Clock::now();
  for_each_layer(layers, "multi-step heuristic", progress, [&](size_t l) {
    solution.plan.layers[l] = compress_layer(layers[l], solution.curves[l].allocated, options);
  });
  solution.heuristic_seconds = seconds_since(start);
  solution.plan.validate();
  return solution;
}

std::vector<double> unit_scores(const at::Tensor& weight, const at::Tensor& gradient, const at::Tensor& running,
                                int64_t rank, const Options& options) {
  TORCH_CHECK_VALUE(weight.dim() >= 2 && gradient.sizes() == weight.sizes() && running.sizes() == weight.sizes(),
                    "unit_scores: weight ", weight.sizes(), ", gradient ", gradient.sizes(), " and running ",
                    running.sizes(), " must have one shape of at least 2 dimensions");
  return RunningLayer(weight, gradient, running, rank).scores(options);
}

std::pair<at::Tensor, at::Tensor> factorize(const at::Tensor& weight, const std::vector<int64_t>& kept_in,
                                            int64_t rank) {
  TORCH_CHECK_VALUE(weight.dim() == 4 || weight.dim() == 2, "factorize: a weight of ", weight.dim(),
                    " dimensions, expected 4 (convolution) or 2 (linear)");
  const at::Tensor index = at::tensor(kept_in, at::TensorOptions(at::kLong).device(weight.device()));
  const at::Tensor kept = weight.detach().index_select(1, index);
  const int64_t outputs = kept.size(0);
  const at::Tensor matrix = kept.reshape({outputs, -1}).to(at::kDouble);
  const int64_t highest = std::min(outputs, matrix.size(1));
  TORCH_CHECK_VALUE(rank >= 1 && rank <= highest, "factorize: rank = ", rank, ", expected 1 to ", highest, " for ",
                    outputs, " x ", matrix.size(1));
  const auto [u, s, vh] = at::linalg_svd(matrix, /*full_matrices=*/false);
  const at::Tensor root = s.narrow(0, 0, rank).sqrt();
  at::Tensor first = (root.unsqueeze(1) * vh.narrow(0, 0, rank)).to(weight.scalar_type());
  at::Tensor second = (u.narrow(1, 0, rank) * root).to(weight.scalar_type());
  if (weight.dim() == 4) {
    first = first.view({rank, kept.size(1), kept.size(2), kept.size(3)});
    second = second.view({outputs, rank, 1, 1});
  }
  return {first.contiguous(), second.contiguous()};
}

}  // namespace cctorch::collaborative
