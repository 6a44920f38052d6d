#include "csrc/ops/batch_norm.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "csrc/ops/batch_norm_passes.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/cpu/isa.h"
#include "csrc/ops/cpu/simd/batch_norm.h"
#include "csrc/ops/formula/layout.h"

namespace cctorch::cpu {
namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr int64_t kVector = 16;    // elements of the longest vector
constexpr int64_t kPeriod = 512;   // elements at least, so that loops have a body
constexpr int64_t kBlock = 16384;  // elements whose sums are taken before any are added up
constexpr int64_t kMostBlocks = 64;

template <typename T>
simd::BatchNormLoops<T> loops() {
  return for_isa(&simd::baseline::batch_norm_loops<T>, &simd::avx2::batch_norm_loops<T>,
                 &simd::avx512::batch_norm_loops<T>)();
}

// The memory of a channels_last tensor, cut in periods of several rows and in blocks of several periods by its shape
// alone: sums do not depend on the number of threads.
struct Rows {
  int64_t numel, channels, period, per_block, blocks;

  explicit Rows(const at::Tensor& x) : numel(x.numel()), channels(x.size(1)) {
    period = channels * kVector;
    period *= std::max<int64_t>(1, kPeriod / period);
    const int64_t periods = ceil_div(numel, period);
    per_block = period * std::max(ceil_div(kBlock, period), ceil_div(periods, kMostBlocks));
    blocks = ceil_div(numel, per_block);
  }

  double count() const { return static_cast<double>(numel) / static_cast<double>(channels); }

  template <typename T>
  std::vector<T> written_out(const std::vector<double>& values) const {
    std::vector<T> out(period);
    for (int64_t i = 0; i < period; ++i) out[i] = static_cast<T>(values[i % channels]);
    return out;
  }

  // function(block, begin, n) for each block of elements
  template <typename Function>
  void for_each_block(const Function& function) const {
    at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        function(block, block * per_block, std::min(per_block, numel - block * per_block));
      }
    });
  }

  // Two sums for each channel. function(begin, n, sum, other) adds to the places of one period.
  template <typename T, typename Function>
  std::pair<std::vector<double>, std::vector<double>> sums(const Function& function) const {
    std::vector<double> partial(blocks * 2 * channels);
    for_each_block([&](int64_t block, int64_t begin, int64_t n) {
      constexpr int64_t kShortSum = 64;  // periods that are added up in T
      std::vector<T> short_sums(2 * period);
      double* to = partial.data() + block * 2 * channels;
      for (int64_t done = 0; done < n; done += kShortSum * period) {
        std::fill(short_sums.begin(), short_sums.end(), T(0));
        function(begin + done, std::min(kShortSum * period, n - done), short_sums.data(), short_sums.data() + period);
        for (int64_t i = 0; i < period; ++i) {
          to[i % channels] += static_cast<double>(short_sums[i]);
          to[channels + i % channels] += static_cast<double>(short_sums[period + i]);
        }
      }
    });
    std::vector<double> first(channels), second(channels);
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t c = 0; c < channels; ++c) {
        first[c] += partial[block * 2 * channels + c];
        second[c] += partial[(block * 2 + 1) * channels + c];
      }
    }
    return {first, second};
  }
};

template <typename T>
std::vector<double> values(const at::Tensor& tensor) {
  const at::Tensor dense = tensor.contiguous();
  return {dense.const_data_ptr<T>(), dense.const_data_ptr<T>() + dense.numel()};
}

template <typename T>
at::Tensor tensor(const std::vector<double>& from, const at::Tensor& like) {
  at::Tensor out = at::empty({static_cast<int64_t>(from.size())}, like.options());
  std::transform(from.begin(), from.end(), out.mutable_data_ptr<T>(), [](double v) { return static_cast<T>(v); });
  return out;
}

// Statistics of each channel around the first row's values, which are exact: sums and outputs keep their digits where
// the mean is large.
template <typename T>
struct Moments {
  std::vector<double> start, offset, variance;  // the mean is start + offset
  std::vector<T> shift;                         // start, written out

  Moments(const Rows& rows, const T* x) : start(x, x + rows.channels), shift(rows.written_out<T>(start)) {
    const auto run = loops<T>();
    std::tie(offset, variance) = rows.sums<T>([&](int64_t begin, int64_t n, T* first, T* second) {
      run.sums(x + begin, n, rows.period, shift.data(), first, second);
    });
    for (int64_t c = 0; c < rows.channels; ++c) {
      offset[c] /= rows.count();
      variance[c] = std::max(variance[c] / rows.count() - offset[c] * offset[c], 0.0);
    }
  }

  std::vector<double> mean() const {
    std::vector<double> mean(start);
    for (size_t c = 0; c < mean.size(); ++c) mean[c] += offset[c];
    return mean;
  }
};

// (x - shift) scale + constant
template <typename T>
at::Tensor affine(const Rows& rows, const at::Tensor& x, const std::vector<T>& shift, const std::vector<double>& scale,
                  const std::vector<double>& constant) {
  const auto run = loops<T>();
  const at::Tensor y = at::empty_like(x);
  const T* from = x.const_data_ptr<T>();
  T* to = y.mutable_data_ptr<T>();
  const std::vector<T> scales = rows.written_out<T>(scale), constants = rows.written_out<T>(constant);
  rows.for_each_block([&](int64_t, int64_t begin, int64_t n) {
    run.normalize(to + begin, from + begin, n, rows.period, shift.data(), scales.data(), constants.data());
  });
  return y;
}

// The sums of grad and of grad (x - mean).
template <typename T>
std::pair<std::vector<double>, std::vector<double>> grad_sums(const Rows& rows, const at::Tensor& grad,
                                                              const at::Tensor& x, const std::vector<T>& means) {
  const auto run = loops<T>();
  const T* gs = grad.const_data_ptr<T>();
  const T* xs = x.const_data_ptr<T>();
  return rows.sums<T>([&](int64_t begin, int64_t n, T* first, T* second) {
    run.grad_sums(gs + begin, xs + begin, n, rows.period, means.data(), first, second);
  });
}

// (grad - constant) scale - (x - mean) slope
template <typename T>
at::Tensor grad_input(const Rows& rows, const at::Tensor& grad, const at::Tensor& x, const std::vector<T>& means,
                      const std::vector<double>& constant, const std::vector<double>& scale,
                      const std::vector<double>& slope) {
  const auto run = loops<T>();
  const at::Tensor grad_x = at::empty_like(x);
  const T* gs = grad.const_data_ptr<T>();
  const T* xs = x.const_data_ptr<T>();
  T* to = grad_x.mutable_data_ptr<T>();
  const std::vector<T> constants = rows.written_out<T>(constant), scales = rows.written_out<T>(scale);
  const std::vector<T> slopes = rows.written_out<T>(slope);
  rows.for_each_block([&](int64_t, int64_t begin, int64_t n) {
    run.grad_x(to + begin, gs + begin, xs + begin, n, rows.period, means.data(), constants.data(), scales.data(),
               slopes.data());
  });
  return grad_x;
}

template <typename T>
Outputs forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  const Rows rows(x);
  const Moments<T> moments(rows, x.const_data_ptr<T>());
  std::vector<double> inverse(rows.channels), scale = values<T>(weight), constant = values<T>(bias);
  for (int64_t c = 0; c < rows.channels; ++c) {
    inverse[c] = 1.0 / std::sqrt(moments.variance[c] + eps);
    scale[c] *= inverse[c];
    constant[c] -= moments.offset[c] * scale[c];
  }
  const at::Tensor y = affine<T>(rows, x, moments.shift, scale, constant);
  return {y, tensor<T>(moments.mean(), weight), tensor<T>(inverse, weight)};
}

template <typename T>
Outputs backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& mean,
                 const at::Tensor& inverse_deviation) {
  const Rows rows(x);
  const std::vector<T> means = rows.written_out<T>(values<T>(mean));
  auto [grad_bias, grad_weight] = grad_sums<T>(rows, grad, x, means);
  // grad_x = weight r (grad - mean(grad) - x^ mean(grad x^)), x^ = (x - mean) r
  std::vector<double> constant(rows.channels), scale = values<T>(weight), slope(rows.channels);
  const std::vector<double> inverse = values<T>(inverse_deviation);
  for (int64_t c = 0; c < rows.channels; ++c) {
    grad_weight[c] *= inverse[c];
    scale[c] *= inverse[c];
    constant[c] = grad_bias[c] / rows.count();
    slope[c] = scale[c] * inverse[c] * grad_weight[c] / rows.count();
  }
  const at::Tensor grad_x = grad_input<T>(rows, grad, x, means, constant, scale, slope);
  return {grad_x, tensor<T>(grad_weight, weight), tensor<T>(grad_bias, weight)};
}

bool ours(const at::Tensor& x) {
  return x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast) &&
         (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble);
}

Outputs batch_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  if (!ours(x)) return fallback::batch_norm(x, weight, bias, eps);
  check_batch_norm(x, {{"weight", &weight}, {"bias", &bias}});
  check_not_empty(x);
  return x.scalar_type() == at::kDouble ? forward<double>(x, weight, bias, eps) : forward<float>(x, weight, bias, eps);
}

Outputs batch_norm_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                            const at::Tensor& mean, const at::Tensor& inverse_deviation, double eps) {
  if (!ours(x)) return fallback::batch_norm_backward(grad, x, weight, mean, inverse_deviation, eps);
  check_backward(grad, x, "batch_norm_backward");
  const at::Tensor dense = grad.contiguous(at::MemoryFormat::ChannelsLast);
  return x.scalar_type() == at::kDouble ? backward<double>(dense, x, weight, mean, inverse_deviation)
                                        : backward<float>(dense, x, weight, mean, inverse_deviation);
}

template <typename T>
at::Tensor inference(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& mean,
                     const at::Tensor& var, double eps) {
  const Rows rows(x);
  std::vector<double> scale = values<T>(weight);
  const std::vector<double> variance = values<T>(var);
  for (int64_t c = 0; c < rows.channels; ++c) scale[c] /= std::sqrt(variance[c] + eps);
  return affine<T>(rows, x, rows.written_out<T>(values<T>(mean)), scale, values<T>(bias));
}

at::Tensor batch_norm_inference(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                const at::Tensor& mean, const at::Tensor& var, double eps) {
  check_batch_norm(x, {{"weight", &weight}, {"bias", &bias}, {"mean", &mean}, {"var", &var}});
  if (x.numel() == 0) return at::empty_like(x);
  if (!ours(x)) return fallback::batch_norm_inference(x, weight, bias, mean, var, eps);
  return x.scalar_type() == at::kDouble ? inference<double>(x, weight, bias, mean, var, eps)
                                        : inference<float>(x, weight, bias, mean, var, eps);
}

template <typename Function>
auto of_type(const at::Tensor& x, const Function& function) {
  return x.scalar_type() == at::kDouble ? function(double()) : function(float());
}

std::tuple<at::Tensor, at::Tensor> batch_norm_moments(const at::Tensor& x) {
  if (!ours(x)) return fallback::batch_norm_moments(x);
  check_not_empty(x);
  return of_type(x, [&]<typename T>(T) -> std::tuple<at::Tensor, at::Tensor> {
    const Moments<T> moments(Rows(x), x.const_data_ptr<T>());
    const at::Tensor like = at::empty({0}, x.options().dtype(at::kDouble));
    return {tensor<double>(moments.mean(), like), tensor<double>(moments.variance, like)};
  });
}

at::Tensor batch_norm_affine(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& scale,
                             const at::Tensor& constant) {
  if (!ours(x)) return fallback::batch_norm_affine(x, mean, scale, constant);
  check_batch_norm_pass("batch_norm_affine", x, {mean, scale, constant});
  const Rows rows(x);
  return of_type(x, [&]<typename T>(T) {
    return affine<T>(rows, x, rows.written_out<T>(values<double>(mean)), values<double>(scale),
                     values<double>(constant));
  });
}

std::tuple<at::Tensor, at::Tensor> batch_norm_grad_sums(const at::Tensor& grad, const at::Tensor& x,
                                                        const at::Tensor& mean) {
  if (!ours(x)) return fallback::batch_norm_grad_sums(grad, x, mean);
  check_batch_norm_pass("batch_norm_grad_sums", x, {mean});
  check_backward(grad, x, "batch_norm_grad_sums");
  const Rows rows(x);
  const at::Tensor dense = grad.contiguous(at::MemoryFormat::ChannelsLast);
  return of_type(x, [&]<typename T>(T) -> std::tuple<at::Tensor, at::Tensor> {
    const auto [sum, product] = grad_sums<T>(rows, dense, x, rows.written_out<T>(values<double>(mean)));
    return {tensor<double>(sum, mean), tensor<double>(product, mean)};
  });
}

at::Tensor batch_norm_grad_input(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean,
                                 const at::Tensor& constant, const at::Tensor& scale, const at::Tensor& slope) {
  if (!ours(x)) return fallback::batch_norm_grad_input(grad, x, mean, constant, scale, slope);
  check_batch_norm_pass("batch_norm_grad_input", x, {mean, constant, scale, slope});
  check_backward(grad, x, "batch_norm_grad_input");
  const Rows rows(x);
  const at::Tensor dense = grad.contiguous(at::MemoryFormat::ChannelsLast);
  return of_type(x, [&]<typename T>(T) {
    return grad_input<T>(rows, dense, x, rows.written_out<T>(values<double>(mean)), values<double>(constant),
                         values<double>(scale), values<double>(slope));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) {
  m.impl("batch_norm_moments", &batch_norm_moments);
  m.impl("batch_norm_affine", &batch_norm_affine);
  m.impl("batch_norm_grad_sums", &batch_norm_grad_sums);
  m.impl("batch_norm_grad_input", &batch_norm_grad_input);
  m.impl("batch_norm", &batch_norm);
  m.impl("batch_norm_backward", &batch_norm_backward);
  m.impl("batch_norm_inference", &batch_norm_inference);
}

}  // namespace cctorch::cpu
