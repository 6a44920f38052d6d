#include <ATen/ATen.h>
#include <cctorch/collaborative.h>
#include <cctorch/low_rank.h>

#include <algorithm>

#include "csrc/collaborative/running_layer.h"

namespace cctorch::collaborative {

std::vector<LayerSpec> participants(const std::vector<LayerSpec>& specs, Units units) {
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
    const bool recurrent = spec.kind == LayerKind::lstm && units != Units::channels;
    if (recurrent || (weighted && !is_first && !is_last)) chosen.push_back(spec);
  }
  return chosen;
}

Solution solve(const std::vector<Layer>& layers, double model_cost, const Options& options, const Progress& progress) {
  return Search(layers, model_cost, options, progress).at(options.target);
}

std::vector<double> unit_scores(const at::Tensor& weight, const at::Tensor& gradient, const at::Tensor& running,
                                int64_t rank, const Options& options) {
  TORCH_CHECK_VALUE(weight.dim() >= 2 && gradient.sizes() == weight.sizes() && running.sizes() == weight.sizes(),
                    "unit_scores: weight ", weight.sizes(), ", gradient ", gradient.sizes(), " and running ",
                    running.sizes(), " must have one shape of at least 2 dimensions");
  const int64_t full_rank = std::min(weight.size(0), weight.numel() / weight.size(0));
  TORCH_CHECK_VALUE(rank >= 0 && rank <= full_rank, "unit_scores: rank = ", rank, ", expected 0 to ", full_rank);
  return RunningLayer(weight, gradient, running, rank, options).scores(options);
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
  const auto [left, right] = truncated_svd(matrix, rank);
  // The factor at the smaller side is orthonormal, the other one has the singular values.
  const bool wide = outputs <= matrix.size(1);
  const at::Tensor values = wide ? at::linalg_vector_norm(right[0], 2, {1}) : at::linalg_vector_norm(left[0], 2, {0});
  const at::Tensor order = at::argsort(values, /*stable=*/true, /*dim=*/0, /*descending=*/true);
  const at::Tensor root = values.sqrt(), inverse = at::where(root > 0, root.reciprocal(), 0.0);
  const at::Tensor& of_left = wide ? root : inverse;
  const at::Tensor& of_right = wide ? inverse : root;
  at::Tensor first = (right[0] * of_right.unsqueeze(1)).index_select(0, order).to(weight.scalar_type());
  at::Tensor second = (left[0] * of_left).index_select(1, order).to(weight.scalar_type());
  if (weight.dim() == 4) {
    first = first.view({rank, kept.size(1), kept.size(2), kept.size(3)});
    second = second.view({outputs, rank, 1, 1});
  }
  return {first.contiguous(), second.contiguous()};
}

}  // namespace cctorch::collaborative
