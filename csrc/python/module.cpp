#include <cctorch/memory.h>
#include <torch/headeronly/version.h>

#include "bindings.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C++ library without its operators; python/cctorch/_C.pyi has the types.";
  module.attr("TORCH_VERSION") = TORCH_VERSION;
#ifdef CCTORCH_CUDA_BUILT
  module.attr("CUDA_BUILT") = true;
#else
  module.attr("CUDA_BUILT") = false;
#endif
  module.def(
      "keep_freed_memory", &cctorch::keep_freed_memory,
      "Tell glibc to keep freed memory for the process. On CPU a training step then spends no time on page faults.");
  module.def("keeps_freed_memory", &cctorch::keeps_freed_memory,
             "Whether keep_freed_memory() was called, and took effect.");
  cctorch::python::bind_codes(module);
  cctorch::python::bind_plan(module);
  cctorch::python::bind_collaborative(module);
  cctorch::python::bind_regularize(module);
  cctorch::python::bind_repair(module);
}
