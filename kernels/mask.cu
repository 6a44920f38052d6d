#include "kernels/mask.cuh"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "csrc/ops/channelwise.h"
#include "csrc/ops/mask.h"
#include "kernels/launch.cuh"
#include "kernels/select.cuh"

namespace cctorch::cuda {
namespace {

template <typename Bits>
const Bits* data(const at::Tensor& weight) {
  return static_cast<const Bits*>(weight.const_data_ptr());
}

// Fills `results`, which are row-major: masks where they are boolean, else pruned weights.
void keep_largest(at::TensorList weights, double sparsity, const std::vector<at::Tensor>& results) {
  const c10::cuda::CUDAGuard guard(weights[0].device());
  std::vector<at::Tensor> dense;
  std::vector<Entry> entries;
  int64_t total = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    dense.push_back(weights[i].contiguous());
    entries.push_back({dense.back().const_data_ptr(), results[i].mutable_data_ptr(), total});
    total += weights[i].numel();
  }
  entries.push_back({nullptr, nullptr, total});
  if (total == 0) return;
  const int64_t span = span_of(total, blocks_on_device(select::kLeastBlocks));
  const int64_t blocks = ceil_div(total, span);
  const auto size = select::Workspace::bytes(blocks, static_cast<int64_t>(weights.size()));
  const at::Tensor memory = at::empty({size}, weights[0].options().dtype(at::kByte));
  const auto workspace = select::Workspace::at(memory.mutable_data_ptr(), blocks);
  const int64_t count = kept_count(sparsity, total);
  with_bits(weights[0].scalar_type(), [&](auto bits) {
    using Bits = decltype(bits);
    const auto infinity = static_cast<Bits>(infinity_bits(weights[0].scalar_type()));
    if (results[0].scalar_type() == at::kBool) {
      select::keep_largest<Bits, bool>(Launch(), entries, span, count, infinity, workspace);
    } else {
      select::keep_largest<Bits, Bits>(Launch(), entries, span, count, infinity, workspace);
    }
  });
}

std::vector<at::Tensor> magnitude_masks(at::TensorList weights, double sparsity) {
  check_magnitudes("magnitude_masks", weights, sparsity);
  std::vector<at::Tensor> masks;
  for (const auto& weight : weights) masks.push_back(row_major_mask(weight));
  if (!weights.empty()) keep_largest(weights, sparsity, masks);
  for (size_t i = 0; i < weights.size(); ++i) masks[i] = in_layout_of(empty_mask(weights[i]), masks[i]);
  return masks;
}

std::vector<at::Tensor> magnitude_prune(at::TensorList weights, double sparsity) {
  check_magnitudes("magnitude_prune", weights, sparsity);
  std::vector<at::Tensor> pruned;
  for (const auto& weight : weights) pruned.push_back(at::empty(weight.sizes(), weight.options()));
  if (!weights.empty()) keep_largest(weights, sparsity, pruned);
  for (size_t i = 0; i < weights.size(); ++i) pruned[i] = in_layout_of(at::empty_like(weights[i]), pruned[i]);
  return pruned;
}

std::vector<at::Tensor> nm_masks(at::TensorList weights, int64_t n, int64_t m, int64_t axis) {
  check_nm_masks(weights, n, m, axis);
  std::vector<at::Tensor> masks, dense;
  if (weights.empty()) return masks;
  const c10::cuda::CUDAGuard guard(weights[0].device());
  std::vector<GroupsEntry> entries;
  std::vector<int64_t> groups;
  for (const auto& weight : weights) {
    masks.push_back(empty_mask(weight));
    const bool in_order = weight.strides() == masks.back().strides();
    dense.push_back(in_order ? weight : at::empty_like(weight).copy_(weight));
    const auto layout = channelwise::layout(dense.back(), axis < 0 ? axis + weight.dim() : axis);
    entries.push_back(
        {dense.back().const_data_ptr(), masks.back().mutable_data_ptr(), 0, std::max<int64_t>(1, layout.inner)});
    groups.push_back(weight.numel() / m);
  }
  with_bits(weights[0].scalar_type(), [&](auto bits) {
    const auto infinity = static_cast<decltype(bits)>(infinity_bits(weights[0].scalar_type()));
    mark_groups(Launch(), entries, groups, n, m, 4 * enough_blocks(), infinity);
  });
  return masks;
}

at::Tensor apply_mask(const at::Tensor& weight, const at::Tensor& mask) {
  check_apply_mask(weight, mask);
  const at::Tensor y = at::empty_like(weight);
  const c10::cuda::CUDAGuard guard(weight.device());
  const at::Tensor dense = weight.strides() == y.strides() ? weight : at::empty_like(y).copy_(weight);
  const at::Tensor dense_mask = mask.strides() == y.strides() ? mask : empty_mask(y).copy_(mask);
  with_bits(weight.scalar_type(), [&](auto bits) {
    apply_mask_bits(Launch(), static_cast<decltype(bits)*>(y.mutable_data_ptr()), data<decltype(bits)>(dense),
                    dense_mask.const_data_ptr<bool>(), weight.numel());
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CUDA, m) {
  m.impl("magnitude_masks", &magnitude_masks);
  m.impl("magnitude_prune", &magnitude_prune);
  m.impl("nm_masks", &nm_masks);
  m.impl("apply_mask", &apply_mask);
}

}  // namespace cctorch::cuda
