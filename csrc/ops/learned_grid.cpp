#include "csrc/ops/learned_grid.h"

#include "csrc/ops/rows.h"

namespace cctorch {

std::optional<int64_t> check_grid_parameter(const char* op, const at::Tensor& x, const at::Tensor& parameter,
                                            const Name& name, std::optional<int64_t> axis, const Name& x_name) {
  check_floating(x, op, x_name);
  const auto type = math_type(x);
  TORCH_CHECK(parameter.scalar_type() == type, op, ": ", name, " must be ", type, " for ", x.scalar_type(), " ", x_name,
              ", got ", parameter.scalar_type(), "; convert it with ", name, ".to(...)");
  check_same_device(x, op, x_name, parameter, name);
  if (!axis) {
    TORCH_SYM_CHECK(parameter.sym_numel().sym_eq(1), op, ": ", name,
                    " must have one element where axis is not given, got ", "shape ", parameter.sym_sizes(),
                    "; give axis for one per channel");
    return axis;
  }
  const int64_t positive = check_axis(x, *axis, op, x_name);
  TORCH_CHECK(parameter.dim() == 1, op, ": ", name, " must be one-dimensional where axis is given, got shape ",
              parameter.sym_sizes());
  TORCH_SYM_CHECK(parameter.sym_size(0).sym_eq(x.sym_size(positive)), op, ": ", name,
                  " must have one element for each of ", "the ", x.sym_size(positive), " indices of axis ", *axis,
                  ", got ", parameter.sym_size(0));
  return positive;
}

void check_grid_parameters(const char* op, at::TensorList x, at::TensorList parameters, const char* name,
                           std::optional<int64_t> axis) {
  check_like_tensors(x, op, "x");
  check_as_many(parameters.size(), x, op, name);
  for (size_t i = 0; i < x.size(); ++i) {
    check_grid_parameter(op, x[i], parameters[i], Name(name, i), axis, Name("x", i));
  }
}

void check_axes(at::TensorList x, std::optional<int64_t> axis, const char* op) {
  for (size_t i = 0; axis && i < x.size(); ++i) check_axis(x[i], *axis, op, Name("x", i));
}

void check_grad_scales(const char* op, at::TensorList x, at::ArrayRef<double> grad_scale) {
  if (!grad_scale.empty()) check_as_many(grad_scale.size(), x, op, "grad_scale");
}

}  // namespace cctorch
