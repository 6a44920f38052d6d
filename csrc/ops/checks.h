#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace cctorch {

inline void check_floating(const at::Tensor& x, const char* op, const char* name) {
  const auto type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op, ": ", name,
              " must be float32, float64, float16 or bfloat16, got ", type);
}

inline void check_same_device(const at::Tensor& a, const char* op, const char* name, const at::Tensor& b,
                              const char* b_name) {
  TORCH_CHECK(a.device() == b.device(), op, ": ", name, " is on ", a.device(), " but ", b_name, " is on ", b.device(),
              "; move one of them");
}

// Floating-point tensors of one type, on one device.
inline void check_like_tensors(at::TensorList tensors, const char* op, const std::string& list) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto name = list + "[" + std::to_string(i) + "]";
    check_floating(tensors[i], op, name.c_str());
    check_same_device(tensors[i], op, name.c_str(), tensors[0], (list + "[0]").c_str());
    TORCH_CHECK(tensors[i].scalar_type() == tensors[0].scalar_type(), op, ": all ", list, " must be of one type, got ",
                tensors[0].scalar_type(), " in ", list, "[0] and ", tensors[i].scalar_type(), " in ", name);
  }
}

inline int64_t check_axis(const at::Tensor& x, int64_t axis, const char* op, const char* name) {
  TORCH_CHECK(-x.dim() <= axis && axis < x.dim(), op, ": axis must be in [", -x.dim(), ", ", x.dim() - 1, "] for a ",
              x.dim(), "-dimensional ", name, ", got ", axis);
  return axis < 0 ? axis + x.dim() : axis;
}

inline void check_backward(const at::Tensor& grad, const at::Tensor& x, const char* op) {
  TORCH_CHECK(grad.sym_sizes().equals(x.sym_sizes()), op, ": grad must have the shape of x, ", x.sym_sizes(), ", got ",
              grad.sym_sizes());
  TORCH_CHECK(grad.scalar_type() == x.scalar_type(), op, ": grad must have the type of x, ", x.scalar_type(), ", got ",
              grad.scalar_type());
}

}  // namespace cctorch
