#include "kernels/group_mask.cuh"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "csrc/ops/channelwise.h"
#include "csrc/ops/mask.h"
#include "kernels/launch.cuh"

namespace cctorch::cuda {
namespace {

using group_masks::Weight;

// The weights and masks in memory, cut into groups; empty weights have none.
struct Groups {
  std::vector<at::Tensor> kept_alive;
  std::vector<Weight> weights;
  int64_t elements = 0;
  int64_t groups = 0;

  void add(const at::Tensor& dense, const at::Tensor& mask, int64_t rows, int64_t columns, int64_t across) {
    kept_alive.push_back(dense);
    weights.push_back({dense.const_data_ptr(), mask.mutable_data_ptr<bool>(), elements, groups, rows, columns, across});
    elements += dense.numel();
    groups += dense.numel() / (rows * columns);
  }
};

void keep_best(Groups groups, int64_t count, bool channels) {
  groups.weights.push_back({nullptr, nullptr, groups.elements, groups.groups, 1, 1, 1});
  const auto size = static_cast<int64_t>(groups.weights.size()) - 1;
  const auto options = groups.kept_alive[0].options().dtype(at::kByte);
  const at::Tensor cleared = at::zeros({group_masks::Workspace::cleared_bytes()}, options);
  const at::Tensor memory = at::empty({group_masks::Workspace::bytes(groups.groups, size)}, options);
  const auto workspace =
      group_masks::Workspace::at(cleared.mutable_data_ptr(), memory.mutable_data_ptr(), groups.groups, size);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, groups.kept_alive[0].scalar_type(), "keep_best", [&] {
    group_masks::keep_best<scalar_t>(Launch(), groups.weights, count, channels, enough_blocks(), workspace);
  });
}

// The slices of any dense layout are blocks: as tall as there are rows, and as wide as a channel is in each.
std::vector<at::Tensor> channel_masks(at::TensorList weights, double sparsity, int64_t axis) {
  check_channel_masks(weights, sparsity, axis);
  const c10::cuda::CUDAGuard guard(weights[0].device());
  Groups groups;
  std::vector<at::Tensor> masks;
  for (const at::Tensor& weight : weights) {
    masks.push_back(empty_mask(weight));
    if (weight.numel() == 0) continue;
    const at::Tensor dense = weight.strides() == masks.back().strides() ? weight : at::empty_like(weight).copy_(weight);
    const auto layout = channelwise::layout(dense, axis < 0 ? axis + weight.dim() : axis);
    groups.add(dense, masks.back(), layout.outer, layout.inner, layout.channels);
  }
  if (groups.groups == 0) return masks;
  const auto fewest = static_cast<int64_t>(groups.weights.size());
  keep_best(groups, std::max(fewest, kept_count(sparsity, groups.groups)), true);
  return masks;
}

std::vector<at::Tensor> block_masks(at::TensorList weights, double sparsity, int64_t rows, int64_t columns) {
  check_block_masks(weights, sparsity, rows, columns);
  const c10::cuda::CUDAGuard guard(weights[0].device());
  Groups groups;
  std::vector<at::Tensor> masks;
  for (const at::Tensor& weight : weights) {
    masks.push_back(row_major_mask(weight));
    if (weight.numel() == 0) continue;
    groups.add(weight.contiguous(), masks.back(), rows, columns, weight.numel() / weight.size(0) / columns);
  }
  if (groups.groups > 0) keep_best(groups, kept_count(sparsity, groups.groups), false);
  for (size_t i = 0; i < weights.size(); ++i) masks[i] = in_layout_of(empty_mask(weights[i]), masks[i]);
  return masks;
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CUDA, m) {
  m.impl("channel_masks", &channel_masks);
  m.impl("block_masks", &block_masks);
}

}  // namespace cctorch::cuda
