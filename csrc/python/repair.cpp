#include <cctorch/repair.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "bindings.h"

namespace py = pybind11;

namespace cctorch::python {

using repair::Affine;
using repair::Fit;
using repair::Moments;
using repair::Norm;
using repair::Options;
using repair::Window;

void bind_repair(py::module_& module) {
  using Release = py::call_guard<py::gil_scoped_release>;
  const Window one_by_one;
  py::class_<Window>(module, "Window")
      .def(py::init<std::array<int64_t, 2>, std::array<int64_t, 2>, std::array<int64_t, 2>, std::array<int64_t, 2>>(),
           py::arg("kernel") = one_by_one.kernel, py::arg("stride") = one_by_one.stride,
           py::arg("padding") = one_by_one.padding, py::arg("dilation") = one_by_one.dilation);
  py::class_<Moments>(module, "Moments")
      .def(py::init<int64_t, int64_t>(), py::arg("inputs"), py::arg("outputs"))
      .def("add", &Moments::add, py::arg("x"), py::arg("y"), Release())
      .def(
          "add_conv2d",
          [](Moments& self, const at::Tensor& x, const at::Tensor& y, const Window& window, int64_t step,
             int64_t first_image) { self.add_conv2d(x, y, window, step, first_image); },
          py::arg("x"), py::arg("y"), py::arg("window"), py::arg("step") = 1, py::arg("first_image") = 0, Release())
      .def(
          "all_reduce",
          [](Moments& self, const py::function& sum) {
            self.all_reduce([&sum](const at::Tensor& sums) { sum(sums); });
          },
          py::arg("sum"))
      .def_property_readonly("samples", &Moments::samples)
      .def_property_readonly("input_mean", &Moments::input_mean)
      .def_property_readonly("output_mean", &Moments::output_mean)
      .def_property_readonly("input_moment", &Moments::input_moment)
      .def_property_readonly("cross_moment", &Moments::cross_moment)
      .def_property_readonly("output_square", &Moments::output_square);
  py::class_<Fit>(module, "Fit")
      .def_readonly("weight", &Fit::weight)
      .def_readonly("intercept", &Fit::intercept)
      .def_readonly("before", &Fit::before)
      .def_readonly("after", &Fit::after);
  module.def("input_samples", &repair::input_samples, py::arg("x"), py::arg("window"), py::arg("step") = 1,
             py::arg("first_image") = 0, Release());
  module.def("output_samples", &repair::output_samples, py::arg("y"), py::arg("step") = 1, py::arg("first_image") = 0,
             Release());
  module.def(
      "least_squares",
      [](const Moments& moments, const at::Tensor& weight, const at::Tensor& constant, double ridge, bool intercept) {
        return repair::least_squares(moments, weight, constant, {ridge, intercept});
      },
      py::arg("moments"), py::arg("weight"), py::arg("constant"), py::arg("ridge") = Options{}.ridge,
      py::arg("intercept") = true, Release());
  module.def(
      "reduced_rank",
      [](const Moments& moments, const at::Tensor& weight, const at::Tensor& constant, int64_t rank, double ridge,
         bool intercept) { return repair::reduced_rank(moments, weight, constant, rank, {ridge, intercept}); },
      py::arg("moments"), py::arg("weight"), py::arg("constant"), py::arg("rank"), py::arg("ridge") = Options{}.ridge,
      py::arg("intercept") = true, Release());
  module.def(
      "alternating_least_squares",
      [](const Moments& moments, const at::Tensor& weight, const at::Tensor& constant, const at::Tensor& inner,
         int64_t rank, double ridge, bool intercept) {
        return repair::alternating_least_squares(moments, weight, constant, inner, rank, {ridge, intercept});
      },
      py::arg("moments"), py::arg("weight"), py::arg("constant"), py::arg("inner"), py::arg("rank"),
      py::arg("ridge") = Options{}.ridge, py::arg("intercept") = true, Release());
  py::class_<Norm>(module, "Norm")
      .def(py::init<at::Tensor, at::Tensor, at::Tensor, at::Tensor, double>(), py::arg("weight"), py::arg("bias"),
           py::arg("running_mean"), py::arg("running_var"), py::arg("eps"));
  py::class_<Affine>(module, "Affine")
      .def(py::init([](const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& first,
                       const std::optional<at::Tensor>& second, const std::optional<at::Tensor>& bias,
                       const std::optional<Norm>& norm, const std::optional<at::Tensor>& core) {
             return Affine{weight.value_or(at::Tensor()),
                           first.value_or(at::Tensor()),
                           second.value_or(at::Tensor()),
                           bias.value_or(at::Tensor()),
                           norm,
                           core.value_or(at::Tensor())};
           }),
           py::kw_only(), py::arg("weight") = py::none(), py::arg("first") = py::none(), py::arg("second") = py::none(),
           py::arg("bias") = py::none(), py::arg("norm") = py::none(), py::arg("core") = py::none())
      .def_property_readonly("inputs", &Affine::inputs)
      .def_property_readonly("outputs", &Affine::outputs);
  module.def("fit_affine", &repair::fit, py::arg("affine"), py::arg("moments"), py::arg("ridge") = Options{}.ridge,
             Release());
}

}  // namespace cctorch::python
