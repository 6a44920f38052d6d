#include "kernels/mask.cuh"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include "csrc/ops/mask.h"
#include "kernels/launch.cuh"
#include "kernels/select.cuh"

namespace cctorch::cuda {
namespace {

template <typename Bits>
const Bits* data(const at::Tensor& weight) {
  return static_cast<const Bits*>(weight.const_data_ptr());
}

std::vector<at::Tensor> magnitude_masks(at::TensorList weights, double sparsity) {
  check_magnitude_masks(weights, sparsity);
  std::vector<at::Tensor> masks;
  if (weights.empty()) return masks;
  const c10::cuda::CUDAGuard guard(weights[0].device());
  std::vector<at::Tensor> dense;
  std::vector<select::Entry> entries;
  int64_t total = 0;
  for (const auto& weight : weights) {
    dense.push_back(weight.contiguous());
    masks.push_back(row_major_mask(weight));
    entries.push_back({dense.back().const_data_ptr(), masks.back().mutable_data_ptr<bool>(), total});
    total += weight.numel();
  }
  entries.push_back({nullptr, nullptr, total});
  if (total > 0) {
    const int64_t span = select::span_of(total, enough_blocks());
    const int64_t blocks = ceil_div(total, span);
    const auto size = select::Workspace::bytes(blocks, static_cast<int64_t>(weights.size()));
    const at::Tensor memory = at::empty({size}, weights[0].options().dtype(at::kByte));
    const auto workspace = select::Workspace::at(memory.mutable_data_ptr(), blocks);
    with_bits(weights[0].scalar_type(), [&](auto bits) {
      using Bits = decltype(bits);
      select::mark_largest<Bits>(Launch(), entries, span, kept_count(sparsity, total),
                                 static_cast<Bits>(infinity_bits(weights[0].scalar_type())), workspace);
    });
  }
  for (size_t i = 0; i < weights.size(); ++i) masks[i] = in_layout_of(weights[i], masks[i]);
  return masks;
}

at::Tensor nm_mask(const at::Tensor& weight, int64_t n, int64_t m, int64_t axis) {
  axis = check_nm_mask(weight, n, m, axis);
  if (weight.numel() == 0) return empty_mask(weight);
  const c10::cuda::CUDAGuard guard(weight.device());
  const at::Tensor dense = weight.contiguous();
  const at::Tensor mask = row_major_mask(weight);
  const int64_t groups = weight.numel() / m;
  const int64_t inner = c10::multiply_integers(weight.sizes().slice(axis + 1));
  with_bits(weight.scalar_type(), [&](auto bits) {
    using Bits = decltype(bits);
    const formula::MagnitudeOrNan<Bits> key{static_cast<Bits>(infinity_bits(weight.scalar_type()))};
    Launch()(ceil_div(groups, kThreads),
             MarkGroups<Bits>{key, data<Bits>(dense), mask.mutable_data_ptr<bool>(), groups, n, m, inner});
  });
  return in_layout_of(weight, mask);
}

at::Tensor apply_mask(const at::Tensor& weight, const at::Tensor& mask) {
  check_apply_mask(weight, mask);
  const at::Tensor y = at::empty_like(weight);
  if (weight.numel() == 0) return y;
  const c10::cuda::CUDAGuard guard(weight.device());
  const at::Tensor dense = weight.strides() == y.strides() ? weight : at::empty_like(y).copy_(weight);
  const at::Tensor dense_mask = mask.strides() == y.strides() ? mask : empty_mask(y).copy_(mask);
  with_bits(weight.scalar_type(), [&](auto bits) {
    using Kernel = ApplyMask<decltype(bits)>;
    Launch()(ceil_div(weight.numel(), Kernel::kPerBlock),
             Kernel{static_cast<decltype(bits)*>(y.mutable_data_ptr()), data<decltype(bits)>(dense),
                    dense_mask.const_data_ptr<bool>(), weight.numel()});
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CUDA, m) {
  m.impl("magnitude_masks", &magnitude_masks);
  m.impl("nm_mask", &nm_mask);
  m.impl("apply_mask", &apply_mask);
}

}  // namespace cctorch::cuda
