#pragma once

#include <pybind11/pybind11.h>

namespace cctorch::python {

void bind_codes(pybind11::module_& module);
void bind_plan(pybind11::module_& module);
void bind_collaborative(pybind11::module_& module);
void bind_regularize(pybind11::module_& module);
void bind_repair(pybind11::module_& module);

}  // namespace cctorch::python
