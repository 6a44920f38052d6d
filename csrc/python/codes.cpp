#include <cctorch/codes.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "bindings.h"

namespace py = pybind11;

namespace cctorch::python {

void bind_codes(py::module_& module) {
  module.def(
      "encode_weights",
      [](Safetensors::Tensors state, const std::map<std::string, std::pair<at::Tensor, int64_t>>& grids) {
        for (const auto& [name, grid] : grids) encode_weight(state, name, grid.first, grid.second);
        return state;
      },
      py::arg("state"), py::arg("grids"), py::call_guard<py::gil_scoped_release>());
  module.def("decode_weights", &decode_weights, py::arg("state"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace cctorch::python
