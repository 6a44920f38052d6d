#include "csrc/ops/fake_quant_weights.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "csrc/ops/channelwise.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/rows.h"

namespace cctorch {

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> fake_quant_weights(at::TensorList weights, int64_t bits,
                                                                                int64_t axis) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("cctorch::fake_quant_weights", "")
                             .typed<decltype(fake_quant_weights)>();
  return op.call(weights, bits, axis);
}

void check_fake_quant_weights(at::TensorList weights, int64_t bits, int64_t axis) {
  constexpr auto op = "fake_quant_weights";
  TORCH_CHECK(2 <= bits && bits <= 16, op, ": bits must be in [2, 16], got ", bits);
  check_like_tensors(weights, op, "weights");
  for (size_t i = 0; i < weights.size(); ++i) {
    check_axis(weights[i], axis, op, Name("weights", i));
  }
}

at::Tensor empty_scales(const at::Tensor& weight, int64_t axis) {
  return at::empty_symint({weight.sym_size(axis)}, weight.options().dtype(math_type(weight)));
}

SliceRows::SliceRows(const at::Tensor& weight, std::optional<int64_t> axis_)
    : to(at::empty_like(weight)), axis(axis_ && *axis_ < 0 ? *axis_ + weight.dim() : axis_) {
  from = channelwise::densified(weight, to);
  moved = weight.numel() > 0 && channelwise::layout(from, axis).outer > 1;
  if (!moved) return;
  from = from.movedim(*axis, 0).contiguous();
  to = at::empty_like(from);
}

at::Tensor SliceRows::result(const at::Tensor& weight) const {
  return moved ? at::empty_like(weight).copy_(to.movedim(0, *axis)) : to;
}

TORCH_LIBRARY_FRAGMENT(cctorch, m) {
  m.def("fake_quant_weights(Tensor[] weights, int bits, int axis=0) -> (Tensor[] quantized, Tensor[] scales)",
        {at::Tag::pt2_compliant_tag});
}

}  // namespace cctorch
