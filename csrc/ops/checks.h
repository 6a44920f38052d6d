#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <ostream>
#include <string>

namespace cctorch {

// What an error calls an argument: "x", or "x[3]" of a list.
struct Name {
  const char* name;
  std::optional<size_t> index;

  Name(const char* name) : name(name) {}  // NOLINT: text is a name
  Name(const char* list, size_t i) : name(list), index(i) {}

  friend std::ostream& operator<<(std::ostream& stream, const Name& name) {
    stream << name.name;
    return name.index ? stream << '[' << *name.index << ']' : stream;
  }
};

inline void check_floating(const at::Tensor& x, const char* op, const Name& name) {
  const auto type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op, ": ", name,
              " must be float32, float64, float16 or bfloat16, got ", type);
}

inline void check_same_device(const at::Tensor& a, const char* op, const Name& name, const at::Tensor& b,
                              const Name& b_name) {
  TORCH_CHECK(a.device() == b.device(), op, ": ", name, " is on ", a.device(), " but ", b_name, " is on ", b.device(),
              "; move one of them");
}

// Floating-point tensors of one type, on one device.
inline void check_like_tensors(at::TensorList tensors, const char* op, const char* list) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Name name(list, i);
    check_floating(tensors[i], op, name);
    check_same_device(tensors[i], op, name, tensors[0], Name(list, 0));
    TORCH_CHECK(tensors[i].scalar_type() == tensors[0].scalar_type(), op, ": all ", list, " must be of one type, got ",
                tensors[0].scalar_type(), " in ", list, "[0] and ", tensors[i].scalar_type(), " in ", name);
  }
}

// A list with something for each tensor of the list x.
inline void check_as_many(size_t count, at::TensorList x, const char* op, const char* list) {
  TORCH_CHECK(count == x.size(), op, ": ", list, " must have one for each of the ", x.size(), " tensors of x, got ",
              count);
}

inline int64_t check_axis(const at::Tensor& x, int64_t axis, const char* op, const Name& name) {
  TORCH_CHECK(-x.dim() <= axis && axis < x.dim(), op, ": axis must be in [", -x.dim(), ", ", x.dim() - 1, "] for a ",
              x.dim(), "-dimensional ", name, ", got ", axis);
  return axis < 0 ? axis + x.dim() : axis;
}

inline void check_backward(const at::Tensor& grad, const at::Tensor& x, const char* op, const Name& grad_name = "grad",
                           const Name& x_name = "x") {
  TORCH_CHECK(grad.sym_sizes().equals(x.sym_sizes()), op, ": ", grad_name, " must have the shape of ", x_name, ", ",
              x.sym_sizes(), ", got ", grad.sym_sizes());
  TORCH_CHECK(grad.scalar_type() == x.scalar_type(), op, ": ", grad_name, " must have the type of ", x_name, ", ",
              x.scalar_type(), ", got ", grad.scalar_type());
}

inline void check_backward(at::TensorList grad, at::TensorList x, const char* op) {
  check_as_many(grad.size(), x, op, "grad");
  for (size_t i = 0; i < x.size(); ++i) check_backward(grad[i], x[i], op, Name("grad", i), Name("x", i));
}

}  // namespace cctorch
