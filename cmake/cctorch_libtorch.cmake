# LibTorch as imported targets, without TorchConfig.cmake: that one stops with an error where torch is a CUDA build and no
# CUDA toolkit is installed. Defines cctorch::libtorch (headers and CPU libraries, plus the CUDA ones where torch has them)
# and, where torch is a Python package, cctorch::libtorch_python.
#
# Looked for in LIBTORCH_ROOT, beside this package, in CMAKE_PREFIX_PATH, in CCTORCH_LIBTORCH_HINT, then through Python.

if(TARGET cctorch::libtorch)
  return()
endif()

set(_cctorch_site_packages ${CMAKE_CURRENT_LIST_DIR}/../../../..)
find_path(CCTORCH_LIBTORCH_ROOT include/torch/library.h NO_CACHE NO_DEFAULT_PATH
          PATHS ${LIBTORCH_ROOT} $ENV{LIBTORCH_ROOT} ${_cctorch_site_packages}/torch)
if(NOT CCTORCH_LIBTORCH_ROOT)
  foreach(_prefix ${CMAKE_PREFIX_PATH} ${CCTORCH_LIBTORCH_HINT})
    # torch.utils.cmake_prefix_path is torch/share/cmake
    foreach(_candidate ${_prefix} ${_prefix}/../..)
      if(EXISTS ${_candidate}/include/torch/library.h)
        get_filename_component(CCTORCH_LIBTORCH_ROOT ${_candidate} ABSOLUTE)
      endif()
    endforeach()
  endforeach()
endif()
if(NOT CCTORCH_LIBTORCH_ROOT)
  find_program(_cctorch_python NAMES python python3)
  execute_process(COMMAND ${_cctorch_python} -c
      "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0], end='')"
    OUTPUT_VARIABLE CCTORCH_LIBTORCH_ROOT ERROR_QUIET)
endif()
if(NOT CCTORCH_LIBTORCH_ROOT)
  message(FATAL_ERROR "cctorch: LibTorch was not found. Install it (pip install torch==2.11.0) or set -DLIBTORCH_ROOT=/path/to/libtorch")
endif()
file(REAL_PATH ${CCTORCH_LIBTORCH_ROOT} CCTORCH_LIBTORCH_ROOT)
get_filename_component(CCTORCH_SITE_PACKAGES ${CCTORCH_LIBTORCH_ROOT} DIRECTORY)

file(STRINGS ${CCTORCH_LIBTORCH_ROOT}/include/torch/headeronly/version.h _cctorch_version_lines
     REGEX "define TORCH_VERSION_(MAJOR|MINOR) ")
string(REGEX REPLACE ".*MAJOR ([0-9]+).*MINOR ([0-9]+).*" "\\1.\\2" CCTORCH_LIBTORCH_VERSION "${_cctorch_version_lines}")
if(NOT CCTORCH_LIBTORCH_VERSION STREQUAL "2.11")
  message(FATAL_ERROR "cctorch: LibTorch in ${CCTORCH_LIBTORCH_ROOT} is ${CCTORCH_LIBTORCH_VERSION}, this version of cctorch is for 2.11 (C++ interfaces differ between versions): pip install torch==2.11.0")
endif()

set(_cctorch_libraries ${CCTORCH_LIBTORCH_ROOT}/lib/libtorch.so ${CCTORCH_LIBTORCH_ROOT}/lib/libtorch_cpu.so
                       ${CCTORCH_LIBTORCH_ROOT}/lib/libc10.so)
if(EXISTS ${CCTORCH_LIBTORCH_ROOT}/lib/libtorch_cuda.so)
  # CUDA operators register themselves when the library is loaded; nothing refers to it by symbol.
  list(APPEND _cctorch_libraries "-Wl,--no-as-needed,${CCTORCH_LIBTORCH_ROOT}/lib/libtorch_cuda.so,--as-needed")
endif()

add_library(cctorch::libtorch INTERFACE IMPORTED)
target_include_directories(cctorch::libtorch SYSTEM INTERFACE
  ${CCTORCH_LIBTORCH_ROOT}/include ${CCTORCH_LIBTORCH_ROOT}/include/torch/csrc/api/include)
target_link_libraries(cctorch::libtorch INTERFACE ${_cctorch_libraries})
target_link_options(cctorch::libtorch INTERFACE
  "LINKER:-rpath-link,${CCTORCH_SITE_PACKAGES}/nvidia/cu13/lib" "LINKER:--allow-shlib-undefined"
  "LINKER:-rpath,${CCTORCH_LIBTORCH_ROOT}/lib")

if(EXISTS ${CCTORCH_LIBTORCH_ROOT}/lib/libtorch_python.so)
  add_library(cctorch::libtorch_python INTERFACE IMPORTED)
  target_link_libraries(cctorch::libtorch_python INTERFACE cctorch::libtorch
                        ${CCTORCH_LIBTORCH_ROOT}/lib/libtorch_python.so)
endif()
