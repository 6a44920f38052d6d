#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/mask.h>

#include <string>
#include <vector>

namespace cctorch {

// floor((1 - sparsity) * total), exact for the decimal fraction that `sparsity` is the nearest double of.
int64_t kept_count(double sparsity, int64_t total);

// "weights[i]", as errors call it
std::string nth_weight(size_t i);

void check_magnitudes(const char* op, at::TensorList weights, double sparsity);
void check_nm_masks(at::TensorList weights, int64_t n, int64_t m, int64_t axis);
void check_channel_masks(at::TensorList weights, double sparsity, int64_t axis);
void check_block_masks(at::TensorList weights, double sparsity, int64_t rows, int64_t columns);
void check_apply_mask(const at::Tensor& weight, const at::Tensor& mask);

// A mask in the dense layout of at::empty_like(weight).
at::Tensor empty_mask(const at::Tensor& weight);

// Row-major, so that positions in memory are the positions ties are decided by.
at::Tensor row_major_mask(const at::Tensor& weight);

// row_major in the layout of result, which it may be written to.
at::Tensor in_layout_of(const at::Tensor& result, const at::Tensor& row_major);

// +infinity as a magnitude: every NaN is above it.
uint64_t infinity_bits(at::ScalarType type);

// Calls function with a value of the unsigned type that a weight's bits are compared as.
template <typename Function>
auto with_bits(at::ScalarType type, const Function& function) {
  const size_t bytes = c10::elementSize(type);
  if (bytes == 8) return function(uint64_t());
  if (bytes == 4) return function(uint32_t());
  return function(uint16_t());
}

}  // namespace cctorch
