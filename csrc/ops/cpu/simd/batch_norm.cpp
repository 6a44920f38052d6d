#include "csrc/ops/cpu/simd/batch_norm.h"

namespace cctorch::simd::CCTORCH_ISA {
namespace {

inline int64_t length(int64_t begin, int64_t n, int64_t period) { return n - begin < period ? n - begin : period; }

template <typename T>
void sums(const T* x, int64_t n, int64_t period, const T* shift, T* sum, T* square) {
  for (int64_t begin = 0; begin < n; begin += period) {
    const T* xs = x + begin;
    const int64_t size = length(begin, n, period);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const T centered = xs[i] - shift[i];
      sum[i] += centered;
      square[i] += centered * centered;
    }
  }
}

template <typename T>
void normalize(T* y, const T* x, int64_t n, int64_t period, const T* shift, const T* scale, const T* constant) {
  for (int64_t begin = 0; begin < n; begin += period) {
    T* ys = y + begin;
    const T* xs = x + begin;
    const int64_t size = length(begin, n, period);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) ys[i] = (xs[i] - shift[i]) * scale[i] + constant[i];
  }
}

template <typename T>
void grad_sums(const T* grad, const T* x, int64_t n, int64_t period, const T* mean, T* sum, T* product) {
  for (int64_t begin = 0; begin < n; begin += period) {
    const T* gs = grad + begin;
    const T* xs = x + begin;
    const int64_t size = length(begin, n, period);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      sum[i] += gs[i];
      product[i] += gs[i] * (xs[i] - mean[i]);
    }
  }
}

template <typename T>
void grad_x(T* grad_x, const T* grad, const T* x, int64_t n, int64_t period, const T* mean, const T* constant,
            const T* scale, const T* slope) {
  for (int64_t begin = 0; begin < n; begin += period) {
    T* out = grad_x + begin;
    const T* gs = grad + begin;
    const T* xs = x + begin;
    const int64_t size = length(begin, n, period);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) out[i] = (gs[i] - constant[i]) * scale[i] - (xs[i] - mean[i]) * slope[i];
  }
}

}  // namespace

template <typename T>
BatchNormLoops<T> batch_norm_loops() {
  return {&sums<T>, &normalize<T>, &grad_sums<T>, &grad_x<T>};
}

template BatchNormLoops<float> batch_norm_loops();
template BatchNormLoops<double> batch_norm_loops();

}  // namespace cctorch::simd::CCTORCH_ISA
