#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/fake_quant.h>

#include <tuple>

#include "csrc/ops/dispatch.h"

namespace cctorch {

using FakeQuantOp = at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, int64_t, std::optional<int64_t>, double);
using FakeQuantListOp = std::vector<at::Tensor>(at::TensorList, at::TensorList, int64_t, int64_t,
                                                std::optional<int64_t>, at::ArrayRef<double>);
using FakeQuantOffsetOp = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t,
                                     std::optional<int64_t>, double);
using FakeQuantOffsetListOp = std::vector<at::Tensor>(at::TensorList, at::TensorList, at::TensorList, int64_t, int64_t,
                                                      std::optional<int64_t>, at::ArrayRef<double>);

std::tuple<at::Tensor, at::Tensor> fake_quant_backward(const at::Tensor& grad, const at::Tensor& x,
                                                       const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                                                       std::optional<int64_t> axis, double grad_scale);

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quant_offset_backward(const at::Tensor& grad, const at::Tensor& x,
                                                                          const at::Tensor& log_scale,
                                                                          const at::Tensor& offset, int64_t qmin,
                                                                          int64_t qmax, std::optional<int64_t> axis,
                                                                          double grad_scale);

Lists<2> fake_quant_list_backward(at::TensorList grad, at::TensorList x, at::TensorList log_scale, int64_t qmin,
                                  int64_t qmax, std::optional<int64_t> axis, at::ArrayRef<double> grad_scale);

Lists<3> fake_quant_offset_list_backward(at::TensorList grad, at::TensorList x, at::TensorList log_scale,
                                         at::TensorList offset, int64_t qmin, int64_t qmax, std::optional<int64_t> axis,
                                         at::ArrayRef<double> grad_scale);

std::tuple<at::Tensor, at::Tensor> pact_backward(const at::Tensor& grad, const at::Tensor& x,
                                                 const at::Tensor& log_alpha, int64_t bits,
                                                 std::optional<int64_t> axis);

void check_range(const char* op, int64_t qmin, int64_t qmax);

// These raise where an argument is wrong and return the axis counted from the front.
std::optional<int64_t> check_fake_quant(const at::Tensor& x, const at::Tensor& log_scale, int64_t qmin, int64_t qmax,
                                        std::optional<int64_t> axis);
std::optional<int64_t> check_fake_quant_offset(const at::Tensor& x, const at::Tensor& log_scale,
                                               const at::Tensor& offset, int64_t qmin, int64_t qmax,
                                               std::optional<int64_t> axis);
void check_fake_quant(at::TensorList x, at::TensorList log_scale, int64_t qmin, int64_t qmax,
                      std::optional<int64_t> axis, at::ArrayRef<double> grad_scale);
void check_fake_quant_offset(at::TensorList x, at::TensorList log_scale, at::TensorList offset, int64_t qmin,
                             int64_t qmax, std::optional<int64_t> axis, at::ArrayRef<double> grad_scale);
std::optional<int64_t> check_pact(const at::Tensor& x, const at::Tensor& log_alpha, int64_t bits,
                                  std::optional<int64_t> axis);

}  // namespace cctorch
