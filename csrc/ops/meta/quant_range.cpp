#include "csrc/ops/quant_range.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "csrc/ops/rows.h"

namespace cctorch::meta {
namespace {

at::Tensor parameters(const at::Tensor& x, std::optional<int64_t> axis) {
  const c10::SymInt count = axis ? x.sym_size(*axis) : c10::SymInt(1);
  return at::empty_symint({count}, at::TensorOptions().dtype(math_type(x)).device(x.device()));
}

at::Tensor quant_range(const at::Tensor& x, int64_t qmin, int64_t qmax, std::optional<int64_t> axis,
                       std::string_view method) {
  axis = check_quant_range("quant_range", x, qmin, qmax, axis, method);
  return parameters(x, axis);
}

std::tuple<at::Tensor, at::Tensor> quant_range_offset(const at::Tensor& x, int64_t qmin, int64_t qmax,
                                                      std::optional<int64_t> axis, std::string_view method) {
  axis = check_quant_range("quant_range_offset", x, qmin, qmax, axis, method);
  return {parameters(x, axis), parameters(x, axis)};
}

void observe_range_(at::Tensor& low, at::Tensor& high, const at::Tensor& x, double momentum,
                    std::optional<int64_t> axis) {
  check_observe_range(low, high, x, momentum, axis);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, Meta, m) {
  m.impl("quant_range", &quant_range);
  m.impl("quant_range_offset", &quant_range_offset);
  m.impl("observe_range_", &observe_range_);
}

}  // namespace cctorch::meta
