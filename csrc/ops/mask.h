#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/mask.h>

#include <vector>

namespace cctorch {

// floor((1 - sparsity) * total), exact for the decimal fraction that `sparsity` is the nearest double of.
int64_t kept_count(double sparsity, int64_t total);

void check_magnitude_masks(at::TensorList weights, double sparsity);
int64_t check_nm_mask(const at::Tensor& weight, int64_t n, int64_t m, int64_t axis);
int64_t check_channel_mask(const at::Tensor& weight, double sparsity, int64_t axis);
void check_apply_mask(const at::Tensor& weight, const at::Tensor& mask);

// A mask in the dense layout of at::empty_like(weight).
at::Tensor empty_mask(const at::Tensor& weight);

// The same masks from ATen operators alone, without waiting for the device: what runs on every backend but the CPU.
namespace composite {

std::vector<at::Tensor> magnitude_masks(at::TensorList weights, double sparsity);
at::Tensor nm_mask(const at::Tensor& weight, int64_t n, int64_t m, int64_t axis);

}  // namespace composite
}  // namespace cctorch
