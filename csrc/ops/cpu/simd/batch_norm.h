#pragma once

#include <cstdint>

namespace cctorch::simd {

// Passes over channels-last memory, whose rows are one position each. Per-channel values are written out for a period
// of several rows, a multiple of every vector's length: an odd number of channels then costs no more than an even one.
// `n` elements from the beginning of a period; sums are added to, by their place in the period.
template <typename T>
struct BatchNormLoops {
  // sum += x - shift, square += (x - shift)^2
  void (*sums)(const T* x, int64_t n, int64_t period, const T* shift, T* sum, T* square);
  // y = (x - shift) scale + constant
  void (*normalize)(T* y, const T* x, int64_t n, int64_t period, const T* shift, const T* scale, const T* constant);
  // sum += grad, product += grad (x - mean)
  void (*grad_sums)(const T* grad, const T* x, int64_t n, int64_t period, const T* mean, T* sum, T* product);
  // grad_x = (grad - constant) scale - (x - mean) slope
  void (*grad_x)(T* grad_x, const T* grad, const T* x, int64_t n, int64_t period, const T* mean, const T* constant,
                 const T* scale, const T* slope);
};

#define CCTORCH_DECLARE_LOOPS(isa)                           \
  namespace isa {                                            \
  template <typename T>                                      \
  BatchNormLoops<T> batch_norm_loops();                      \
  extern template BatchNormLoops<float> batch_norm_loops();  \
  extern template BatchNormLoops<double> batch_norm_loops(); \
  }

CCTORCH_DECLARE_LOOPS(baseline)
CCTORCH_DECLARE_LOOPS(avx2)
CCTORCH_DECLARE_LOOPS(avx512)
#undef CCTORCH_DECLARE_LOOPS

}  // namespace cctorch::simd
