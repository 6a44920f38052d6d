#include "csrc/ops/value_grid.h"

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "csrc/ops/cpu/channelwise.h"
#include "csrc/ops/cpu/fitted_rows.h"
#include "csrc/ops/cpu/row_fit.h"

namespace cctorch::cpu {
namespace {

template <typename S>
RowOf row_of(const S* from, int64_t size) {
  return {from, size, channelwise::storage(c10::CppTypeToScalarType<S>::value)};
}

// Rows of whose levels find(split, row) tells.
template <typename Find>
std::vector<at::Tensor> on_levels(at::TensorList xs, std::optional<int64_t> axis, const Find& find) {
  const auto rows = rows_of(xs, axis);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, xs[0].scalar_type(), "on_levels", [&] {
    fit_rows<scalar_t, MagnitudeSplit>(
        rows,
        [&](MagnitudeSplit& split, size_t, int64_t, const scalar_t* from, int64_t size) {
          return find(split, row_of(from, size));
        },
        [](const MagnitudeSplit&, const SignedLevels& levels, scalar_t* to, const scalar_t* from, int64_t, int64_t size,
           simd::Stores stores) { replace(row_of(from, size), to, levels, stores); });
  });
  return results_of(rows, xs);
}

struct Codes {
  RowFit fit;
  std::vector<double> values;
};

// Rows that project(fit, values, size) replaces, in float64.
template <typename Project>
std::vector<at::Tensor> projected(at::TensorList xs, std::optional<int64_t> axis, const Project& project) {
  const auto rows = rows_of(xs, axis);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, xs[0].scalar_type(), "projected", [&] {
    fit_rows<scalar_t, Codes>(
        rows,
        [&](Codes& codes, size_t, int64_t, const scalar_t* from, int64_t size) {
          codes.values.assign(from, from + size);
          project(codes.fit, codes.values.data(), size);
          return codes.values.data();
        },
        [](const Codes&, const double* values, scalar_t* to, const scalar_t*, int64_t offset, int64_t size,
           simd::Stores) {
          std::transform(values + offset, values + offset + size, to,
                         [](double value) { return static_cast<scalar_t>(value); });
        });
  });
  return results_of(rows, xs);
}

std::vector<at::Tensor> signs_of(at::TensorList xs, std::optional<int64_t> axis) {
  return on_levels(xs, axis, [](MagnitudeSplit&, const RowOf& row) { return scaled_signs(row); });
}

std::vector<at::Tensor> ternary_of(at::TensorList xs, std::optional<int64_t> axis) {
  return on_levels(xs, axis, [](MagnitudeSplit& split, const RowOf& row) { return split.ternary(row); });
}

std::vector<at::Tensor> codes_of(at::TensorList xs, int64_t bits, std::string_view method,
                                 std::optional<int64_t> axis) {
  if (bits == 1) return signs_of(xs, axis);
  if (method == "greedy") {
    return projected(xs, axis, [&](RowFit& fit, double* row, int64_t size) { fit.greedy_code(row, size, bits); });
  }
  if (bits == 2) {
    return on_levels(xs, axis, [](MagnitudeSplit& split, const RowOf& row) { return split.two_magnitudes(row); });
  }
  return projected(xs, axis, [&](RowFit& fit, double* row, int64_t size) { fit.binary_code(row, size, bits); });
}

at::Tensor binary_quant(const at::Tensor& x, std::optional<int64_t> axis) {
  return signs_of(x, check_value_grid("binary_quant", x, axis)).front();
}

at::Tensor ternary_quant(const at::Tensor& x, std::optional<int64_t> axis) {
  return ternary_of(x, check_value_grid("ternary_quant", x, axis)).front();
}

at::Tensor binary_code_quant(const at::Tensor& x, int64_t bits, std::string_view method, std::optional<int64_t> axis) {
  return codes_of(x, bits, method, check_binary_code_quant(x, bits, method, axis)).front();
}

std::vector<at::Tensor> binary_quant_list(at::TensorList x, std::optional<int64_t> axis) {
  check_value_grid("binary_quant", x, axis);
  return signs_of(x, axis);
}

std::vector<at::Tensor> ternary_quant_list(at::TensorList x, std::optional<int64_t> axis) {
  check_value_grid("ternary_quant", x, axis);
  return ternary_of(x, axis);
}

std::vector<at::Tensor> binary_code_quant_list(at::TensorList x, int64_t bits, std::string_view method,
                                               std::optional<int64_t> axis) {
  check_binary_code_quant(x, bits, method, axis);
  return codes_of(x, bits, method, axis);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) {
  m.impl("binary_quant", &binary_quant);
  m.impl("ternary_quant", &ternary_quant);
  m.impl("binary_code_quant", &binary_code_quant);
  m.impl("binary_quant.list", &binary_quant_list);
  m.impl("ternary_quant.list", &ternary_quant_list);
  m.impl("binary_code_quant.list", &binary_code_quant_list);
}

}  // namespace cctorch::cpu
