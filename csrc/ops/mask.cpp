#include "csrc/ops/mask.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "csrc/ops/checks.h"

namespace cctorch {

std::vector<at::Tensor> magnitude_masks(at::TensorList weights, double sparsity) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::magnitude_masks", "").typed<decltype(magnitude_masks)>();
  return op.call(weights, sparsity);
}

std::vector<at::Tensor> magnitude_prune(at::TensorList weights, double sparsity) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::magnitude_prune", "").typed<decltype(magnitude_prune)>();
  return op.call(weights, sparsity);
}

std::vector<at::Tensor> nm_masks(at::TensorList weights, int64_t n, int64_t m, int64_t axis) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::nm_masks", "").typed<decltype(nm_masks)>();
  return op.call(weights, n, m, axis);
}

std::vector<at::Tensor> channel_masks(at::TensorList weights, double sparsity, int64_t axis) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::channel_masks", "").typed<decltype(channel_masks)>();
  return op.call(weights, sparsity, axis);
}

std::vector<at::Tensor> block_masks(at::TensorList weights, double sparsity, int64_t rows, int64_t columns) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::block_masks", "").typed<decltype(block_masks)>();
  return op.call(weights, sparsity, rows, columns);
}

at::Tensor apply_mask(const at::Tensor& weight, const at::Tensor& mask) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::apply_mask", "").typed<decltype(apply_mask)>();
  return op.call(weight, mask);
}

int64_t kept_count(double sparsity, int64_t total) {
  // (1 - 0.9) * 10 is 1 less one rounding error.
  const double exact = (1 - sparsity) * static_cast<double>(total);
  const double error = 2 * std::numeric_limits<double>::epsilon() * static_cast<double>(total);
  return std::min(total, static_cast<int64_t>(std::floor(exact + error)));
}

namespace {

void check_sparsity(const char* op, double sparsity) {
  TORCH_CHECK(0 <= sparsity && sparsity <= 1, op, ": sparsity must be in [0, 1], got ", sparsity);
}

}  // namespace

std::string nth_weight(size_t i) { return "weights[" + std::to_string(i) + "]"; }

namespace {

void check_multiple(const char* op, const std::string& what, const c10::SymInt& size, const char* of, int64_t value) {
  TORCH_SYM_CHECK((size % value).sym_eq(0), op, ": ", what, " must be a multiple of ", of, " = ", value, ", got size ",
                  size, "; leave such a layer out or choose another ", of);
}

}  // namespace

void check_magnitudes(const char* op, at::TensorList weights, double sparsity) {
  check_sparsity(op, sparsity);
  check_like_tensors(weights, op, "weights");
}

void check_nm_masks(at::TensorList weights, int64_t n, int64_t m, int64_t axis) {
  constexpr auto op = "nm_masks";
  TORCH_CHECK(1 <= n && n <= m, op, ": expected 1 <= n <= m, got n = ", n, " and m = ", m);
  check_like_tensors(weights, op, "weights");
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto name = nth_weight(i);
    const int64_t positive = check_axis(weights[i], axis, op, name.c_str());
    check_multiple(op, "axis " + std::to_string(axis) + " of " + name, weights[i].sym_size(positive), "m", m);
  }
}

void check_channel_masks(at::TensorList weights, double sparsity, int64_t axis) {
  constexpr auto op = "channel_masks";
  check_sparsity(op, sparsity);
  check_like_tensors(weights, op, "weights");
  for (size_t i = 0; i < weights.size(); ++i) check_axis(weights[i], axis, op, nth_weight(i).c_str());
}

void check_block_masks(at::TensorList weights, double sparsity, int64_t rows, int64_t columns) {
  constexpr auto op = "block_masks";
  check_sparsity(op, sparsity);
  TORCH_CHECK(rows >= 1 && columns >= 1, op, ": rows and columns must be at least 1, got ", rows, " and ", columns);
  check_like_tensors(weights, op, "weights");
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto name = nth_weight(i);
    TORCH_CHECK(weights[i].dim() >= 2, op, ": ", name, " must have two dimensions at least, got shape ",
                weights[i].sym_sizes());
    c10::SymInt others = 1;
    for (int64_t d = 1; d < weights[i].dim(); ++d) others = others * weights[i].sym_size(d);
    check_multiple(op, "dimension 0 of " + name, weights[i].sym_size(0), "rows", rows);
    check_multiple(op, "the product of the other dimensions of " + name, others, "columns", columns);
  }
}

void check_apply_mask(const at::Tensor& weight, const at::Tensor& mask) {
  constexpr auto op = "apply_mask";
  check_floating(weight, op, "weight");
  TORCH_CHECK(mask.scalar_type() == at::kBool, op, ": mask must be bool, got ", mask.scalar_type());
  check_same_device(weight, op, "weight", mask, "mask");
  TORCH_CHECK(mask.sym_sizes().equals(weight.sym_sizes()), op, ": mask must have the shape of weight, ",
              weight.sym_sizes(), ", got ", mask.sym_sizes());
}

at::Tensor empty_mask(const at::Tensor& weight) { return at::empty_like(weight, weight.options().dtype(at::kBool)); }

at::Tensor row_major_mask(const at::Tensor& weight) {
  return at::empty(weight.sizes(), weight.options().dtype(at::kBool).memory_format(at::MemoryFormat::Contiguous));
}

at::Tensor in_layout_of(const at::Tensor& result, const at::Tensor& row_major) {
  return result.strides() == row_major.strides() ? row_major : result.copy_(row_major);
}

uint64_t infinity_bits(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return 0x7ff0000000000000;
    case at::kHalf:
      return 0x7c00;
    case at::kBFloat16:
      return 0x7f80;
    default:
      return 0x7f800000;
  }
}

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  m.def("magnitude_masks(Tensor[] weights, float sparsity) -> Tensor[]", {at::Tag::pt2_compliant_tag});
  m.def("magnitude_prune(Tensor[] weights, float sparsity) -> Tensor[]", {at::Tag::pt2_compliant_tag});
  m.def("nm_masks(Tensor[] weights, int n, int m, int axis=1) -> Tensor[]", {at::Tag::pt2_compliant_tag});
  m.def("channel_masks(Tensor[] weights, float sparsity, int axis=0) -> Tensor[]", {at::Tag::pt2_compliant_tag});
  m.def("block_masks(Tensor[] weights, float sparsity, int rows, int columns) -> Tensor[]",
        {at::Tag::pt2_compliant_tag});
  m.def("apply_mask(Tensor weight, Tensor mask) -> Tensor", {at::Tag::pt2_compliant_tag});
}

}  // namespace cctorch
