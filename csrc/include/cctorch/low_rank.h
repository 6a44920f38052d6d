#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace cctorch {

// left[i] right[i] is the nearest matrix of rank ranks[i] to matrices[i] (Eckart-Young), which may be a batch; left is
// rows x rank, right rank x columns. Many are decomposed at once, on CPU one on each thread. `bases` are factors that
// an earlier call returned for similar matrices: left[i] of those with no more rows than columns, right[i] of others,
// or an empty tensor. No gradient.
//
// How near: python/cctorch/ops/low_rank.py says which route is taken when, and what it guarantees.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> truncated_svd(at::TensorList matrices,
                                                                           at::IntArrayRef ranks,
                                                                           at::TensorList bases = {});

// y = (x first^T) second^T + bias, first: rank x C, second: N x rank. Multiplies the factors out first where that is
// cheaper for the given number of rows.
at::Tensor low_rank_linear(const at::Tensor& x, const at::Tensor& first, const at::Tensor& second,
                           const std::optional<at::Tensor>& bias = std::nullopt);

// A convolution with `first` (rank x C x kh x kw) and then one with `second` (N x rank x 1 x 1) and the bias. Or two
// one-dimensional ones: `first` of kernel 1 x kw, `second` of kernel kh x 1. Stride, padding and dilation of a
// dimension apply where the kernel extends in it. Multiplies the factors out first where that is cheaper.
at::Tensor low_rank_conv2d(const at::Tensor& x, const at::Tensor& first, const at::Tensor& second,
                           const std::optional<at::Tensor>& bias = std::nullopt, at::IntArrayRef stride = {1, 1},
                           at::IntArrayRef padding = {0, 0}, at::IntArrayRef dilation = {1, 1});

// Three convolutions: 1 x 1 with `first` (R_in x C x 1 x 1), kh x kw with `core` (R_out x R_in x kh x kw; stride,
// padding and dilation apply here), 1 x 1 with `second` (N x R_out x 1 x 1) and the bias. Or one, multiplied out, if
// cheaper.
at::Tensor tucker2_conv2d(const at::Tensor& x, const at::Tensor& first, const at::Tensor& core,
                          const at::Tensor& second, const std::optional<at::Tensor>& bias = std::nullopt,
                          at::IntArrayRef stride = {1, 1}, at::IntArrayRef padding = {0, 0},
                          at::IntArrayRef dilation = {1, 1});

// One layer of an LSTM in one direction, over all steps; `reverse` starts at the last one. Each weight is a list of one
// matrix, or of two factors, `first` and `second` as in low_rank_linear; the products of x are of all steps at once. On
// CUDA cuDNN gets the product of weight_hh's factors, where that has at most 2^24 elements (2^23 without gradients); it
// has no second derivatives, which need at::globalContext().setUserEnabledCuDNN(false). For gates
// [i f g o] = x_t W_ih^T + b_ih + h W_hh^T + b_hh,
//   c = sigmoid(f) c + sigmoid(i) tanh(g),  h = sigmoid(o) tanh(c)  (times W_hr^T where that is not empty).
//
// x is steps x batch x inputs, h batch x outputs, c batch x hidden. With `batch_sizes`, the examples at each step, on
// the CPU, falling and the first one the batch, x is the data of a packed sequence: rows x inputs. Returns the outputs,
// of the shape of x but for the last dimension, and the last h and c.
std::tuple<at::Tensor, at::Tensor, at::Tensor> low_rank_lstm(
    const at::Tensor& x, const at::Tensor& h, const at::Tensor& c, at::TensorList weight_ih, at::TensorList weight_hh,
    at::TensorList weight_hr = {}, const std::optional<at::Tensor>& bias_ih = std::nullopt,
    const std::optional<at::Tensor>& bias_hh = std::nullopt,
    const std::optional<at::Tensor>& batch_sizes = std::nullopt, bool reverse = false);

// Tucker-2 of many weights, N x C x ...: cores[i] (ranks_out[i] x ranks_in[i] x ...), bases_out[i] (N x ranks_out[i])
// and bases_in[i] (C x ranks_in[i]), whose columns are orthonormal: the truncated higher-order SVD and then
// `iterations` of orthogonal iteration. The last two lists are of an earlier call for similar weights, or empty. No
// gradient.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>> tucker2(
    at::TensorList weights, at::IntArrayRef ranks_out, at::IntArrayRef ranks_in, int64_t iterations = 2,
    at::TensorList bases_out = {}, at::TensorList bases_in = {});

}  // namespace cctorch
