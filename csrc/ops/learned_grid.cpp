#include "csrc/ops/learned_grid.h"

#include "csrc/ops/rows.h"

namespace cctorch {

std::optional<int64_t> check_grid_parameter(const char* op, const at::Tensor& x, const at::Tensor& parameter,
                                            const char* name, std::optional<int64_t> axis) {
  check_floating(x, op, "x");
  const auto type = math_type(x);
  TORCH_CHECK(parameter.scalar_type() == type, op, ": ", name, " must be ", type, " for ", x.scalar_type(), " x, got ",
              parameter.scalar_type(), "; convert it with ", name, ".to(...)");
  check_same_device(x, op, "x", parameter, name);
  if (!axis) {
    TORCH_SYM_CHECK(parameter.sym_numel().sym_eq(1), op, ": ", name,
                    " must have one element where axis is not given, got ", "shape ", parameter.sym_sizes(),
                    "; give axis for one per channel");
    return axis;
  }
  const int64_t positive = check_axis(x, *axis, op, "x");
  TORCH_CHECK(parameter.dim() == 1, op, ": ", name, " must be one-dimensional where axis is given, got shape ",
              parameter.sym_sizes());
  TORCH_SYM_CHECK(parameter.sym_size(0).sym_eq(x.sym_size(positive)), op, ": ", name,
                  " must have one element for each of ", "the ", x.sym_size(positive), " indices of axis ", *axis,
                  ", got ", parameter.sym_size(0));
  return positive;
}

}  // namespace cctorch
