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

at::Tensor nm_mask(const at::Tensor& weight, int64_t n, int64_t m, int64_t axis) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::nm_mask", "").typed<decltype(nm_mask)>();
  return op.call(weight, n, m, axis);
}

at::Tensor channel_mask(const at::Tensor& weight, double sparsity, int64_t axis) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("cctorch::channel_mask", "").typed<decltype(channel_mask)>();
  return op.call(weight, sparsity, axis);
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

void check_magnitude_masks(at::TensorList weights, double sparsity) {
  constexpr auto op = "magnitude_masks";
  check_sparsity(op, sparsity);
  check_like_tensors(weights, op, "weights");
}

int64_t check_nm_mask(const at::Tensor& weight, int64_t n, int64_t m, int64_t axis) {
  constexpr auto op = "nm_mask";
  check_floating(weight, op, "weight");
  TORCH_CHECK(1 <= n && n <= m, op, ": expected 1 <= n <= m, got n = ", n, " and m = ", m);
  const int64_t positive = check_axis(weight, axis, op, "weight");
  TORCH_SYM_CHECK((weight.sym_size(positive) % m).sym_eq(0), op, ": axis ", axis,
                  " of weight must be a multiple of m = ", m, ", got size ", weight.sym_size(positive),
                  "; leave such a layer dense or choose another m");
  return positive;
}

int64_t check_channel_mask(const at::Tensor& weight, double sparsity, int64_t axis) {
  constexpr auto op = "channel_mask";
  check_floating(weight, op, "weight");
  check_sparsity(op, sparsity);
  return check_axis(weight, axis, op, "weight");
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

at::Tensor in_layout_of(const at::Tensor& weight, const at::Tensor& mask) {
  const at::Tensor result = empty_mask(weight);
  return result.strides() == mask.strides() ? mask : result.copy_(mask);
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
  m.def("nm_mask(Tensor weight, int n, int m, int axis=1) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("channel_mask(Tensor weight, float sparsity, int axis=0) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("apply_mask(Tensor weight, Tensor mask) -> Tensor", {at::Tag::pt2_compliant_tag});
}

}  // namespace cctorch
