#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/fake_quant_weights.h>

#include <optional>

#include "csrc/ops/formula/fake_quant_weights.h"

namespace cctorch {

void check_fake_quant_weights(at::TensorList weights, int64_t bits, int64_t axis);

inline int64_t symmetric_qmax(int64_t bits) { return (int64_t{1} << (bits - 1)) - 1; }

// One scale for each index of `axis`.
at::Tensor empty_scales(const at::Tensor& weight, int64_t axis);

// A weight whose slices along `axis` are rows in memory, without one all of it, and where to put them; `result` is in
// the layout of at::empty_like(weight).
struct SliceRows {
  at::Tensor from;
  at::Tensor to;
  std::optional<int64_t> axis;
  bool moved;

  SliceRows(const at::Tensor& weight, std::optional<int64_t> axis);

  int64_t count() const { return axis ? to.size(moved ? 0 : *axis) : 1; }
  int64_t size() const { return to.numel() / count(); }
  at::Tensor result(const at::Tensor& weight) const;
};

}  // namespace cctorch
