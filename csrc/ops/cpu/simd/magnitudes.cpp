#include "csrc/ops/cpu/simd/magnitudes.h"

#include <type_traits>

#include "csrc/ops/cpu/simd/reader.h"

namespace cctorch::simd::CCTORCH_ISA {
namespace {

// Sums of so many numbers are kept in the type of the arithmetic: with 16 or 8 of them at once, float32 is off by less
// than 1e-5 then.
constexpr int64_t kShortSum = 1024;

template <typename T>
T magnitude(T x) {
  if constexpr (sizeof(T) == 8) return __builtin_fabs(x);
  if constexpr (sizeof(T) == 4) return __builtin_fabsf(x);
}

template <typename S, typename T>
Magnitudes summary(const void* x, int64_t n) {
  constexpr int64_t kStep = std::is_same_v<S, T> ? kShortSum : kTile;
  Reader<S, T> read;
  double sum = 0;
  T largest = 0;
  for (int64_t begin = 0; begin < n; begin += kStep) {
    const int64_t size = n - begin < kStep ? n - begin : kStep;
    const T* values = read(x, begin, size);
#pragma omp simd reduction(+ : sum) reduction(max : largest)
    for (int64_t i = 0; i < size; ++i) {
      const T value = magnitude(values[i]);
      sum += static_cast<double>(value);
      largest = value > largest ? value : largest;
    }
  }
  return {sum, static_cast<double>(largest)};
}

// Four thresholds at a time: their counts and sums stay in registers.
template <typename T>
void four_tails(const T* values, int64_t n, const double* thresholds, Tail* tails) {
  using Count = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  const T t0 = static_cast<T>(thresholds[0]);
  const T t1 = static_cast<T>(thresholds[1]);
  const T t2 = static_cast<T>(thresholds[2]);
  const T t3 = static_cast<T>(thresholds[3]);
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  Count c0 = 0, c1 = 0, c2 = 0, c3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, c0, c1, c2, c3)
  for (int64_t i = 0; i < n; ++i) {
    const T value = magnitude(values[i]);
    s0 += value > t0 ? value : T(0);
    s1 += value > t1 ? value : T(0);
    s2 += value > t2 ? value : T(0);
    s3 += value > t3 ? value : T(0);
    c0 += value > t0 ? 1 : 0;
    c1 += value > t1 ? 1 : 0;
    c2 += value > t2 ? 1 : 0;
    c3 += value > t3 ? 1 : 0;
  }
  const T sums[4] = {s0, s1, s2, s3};
  const Count counts[4] = {c0, c1, c2, c3};
  for (int j = 0; j < 4; ++j) {
    tails[j].sum += static_cast<double>(sums[j]);
    tails[j].count += static_cast<double>(counts[j]);
  }
}

template <typename S, typename T>
void tails(const void* x, int64_t n, const double* thresholds, Tail* to) {
  constexpr int64_t kStep = std::is_same_v<S, T> ? kShortSum : kTile;
  static_assert(kTails == 8);
  Reader<S, T> read;
  for (int64_t begin = 0; begin < n; begin += kStep) {
    const int64_t size = n - begin < kStep ? n - begin : kStep;
    const T* values = read(x, begin, size);
    four_tails(values, size, thresholds, to);
    four_tails(values, size, thresholds + 4, to + 4);
  }
}

template <typename T>
int64_t gather(const T* values, int64_t n, T low, T high, T* inside) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T value = magnitude(values[i]);
    inside[count] = value;
    count += value > low && value <= high ? 1 : 0;
  }
  return count;
}

#ifdef __AVX512F__
// Lanes behind the found ones are overwritten by the next.
int64_t gather(const double* values, int64_t n, double low, double high, double* inside) {
  const __m512d lows = _mm512_set1_pd(low);
  const __m512d highs = _mm512_set1_pd(high);
  int64_t count = 0;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m512d keys = _mm512_abs_pd(_mm512_loadu_pd(values + i));
    const __mmask8 found = _mm512_mask_cmp_pd_mask(_mm512_cmp_pd_mask(keys, lows, _CMP_GT_OQ), keys, highs, _CMP_LE_OQ);
    _mm512_storeu_pd(inside + count, _mm512_maskz_compress_pd(found, keys));
    count += __builtin_popcount(found);
  }
  return count + gather<double>(values + i, n - i, low, high, inside + count);
}

int64_t gather(const float* values, int64_t n, float low, float high, float* inside) {
  const __m512 lows = _mm512_set1_ps(low);
  const __m512 highs = _mm512_set1_ps(high);
  int64_t count = 0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512 keys = _mm512_abs_ps(_mm512_loadu_ps(values + i));
    const __mmask16 found =
        _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(keys, lows, _CMP_GT_OQ), keys, highs, _CMP_LE_OQ);
    _mm512_storeu_ps(inside + count, _mm512_maskz_compress_ps(found, keys));
    count += __builtin_popcount(found);
  }
  return count + gather<float>(values + i, n - i, low, high, inside + count);
}
#endif

// The same in float64.
int64_t gather_wide(const double* values, int64_t n, double low, double high, double* inside) {
  return gather(values, n, low, high, inside);
}

int64_t gather_wide(const float* values, int64_t n, float low, float high, double* inside) {
  float found[kShortSum + 16];
  const int64_t count = gather(values, n, low, high, found);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) inside[i] = static_cast<double>(found[i]);
  return count;
}

template <typename S, typename T>
int64_t cut(const void* x, int64_t n, double low, double high, Outside& outside, double* inside) {
  constexpr int64_t kStep = std::is_same_v<S, T> ? kShortSum : kTile;
  using Count = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  const T least = static_cast<T>(low);
  const T most = static_cast<T>(high);
  Reader<S, T> read;
  int64_t found = 0;
  for (int64_t begin = 0; begin < n; begin += kStep) {
    const int64_t size = n - begin < kStep ? n - begin : kStep;
    const T* values = read(x, begin, size);
    double above = 0;
    double below = 0;
    Count count = 0;
#pragma omp simd reduction(+ : above, below, count)
    for (int64_t i = 0; i < size; ++i) {
      const T value = magnitude(values[i]);
      above += static_cast<double>(value > most ? value : T(0));
      below += static_cast<double>(value > least ? T(0) : value);
      count += value > most ? 1 : 0;
    }
    outside.above.sum += above;
    outside.above.count += static_cast<double>(count);
    outside.below += below;
    found += gather_wide(values, size, least, most, inside + found);
  }
  return found;
}

// The largest number of the type up to `bound`, which is not negative: what is above one is above the other.
template <typename T>
T up_to(double bound) {
  const T rounded = static_cast<T>(bound);
  if constexpr (sizeof(T) == 4) {
    return static_cast<double>(rounded) > bound ? __builtin_nextafterf(rounded, 0.0F) : rounded;
  }
  return rounded;
}

template <typename S, typename T>
void replace(void* y, const void* x, int64_t n, double bound, double high, double low, Stores stores) {
  const T least = up_to<T>(bound);
  const T large = static_cast<T>(high);
  const T small = static_cast<T>(low);
  Reader<S, T> read_x;
  Writer<S, T> write_y(stores);
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t size = tile_size(begin, n);
    const T* xs = read_x(x, begin, size);
    T* ys = write_y.tile(y, begin);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const T value = magnitude(xs[i]) > least ? large : small;
      ys[i] = xs[i] < 0 ? T(0) - value : value;
    }
    write_y.flush(y, begin, size);
  }
}

template <typename S, typename T>
constexpr MagnitudeLoops of{&summary<S, T>, &tails<S, T>, &cut<S, T>, &replace<S, T>};

}  // namespace

MagnitudeLoops magnitude_loops(Storage storage) {
  return with_types(storage, []<typename S, typename T>() { return of<S, T>; });
}

// Some of them at a time are compared with all: what is above stays in registers.
void ranks(const double* x, int64_t m, Tail* tails) {
  constexpr int64_t kLanes = kRankLanes / 2;
  using Values = double __attribute__((vector_size(kLanes * sizeof(double))));
  using Counts = int64_t __attribute__((vector_size(kLanes * sizeof(int64_t))));
  for (int64_t begin = 0; begin < m; begin += kRankLanes) {
    const int64_t size = m - begin < kRankLanes ? m - begin : kRankLanes;
    Values own[2] = {};
    Values sums[2] = {};
    Counts counts[2] = {};
    __builtin_memcpy(own, x + begin, sizeof(own));
    for (int64_t j = 0; j < m; ++j) {
      const Values value = x[j] - Values{};
      const Counts first = value > own[0];
      const Counts second = value > own[1];
      sums[0] += reinterpret_cast<Values>(first & reinterpret_cast<Counts>(value));
      sums[1] += reinterpret_cast<Values>(second & reinterpret_cast<Counts>(value));
      counts[0] -= first;
      counts[1] -= second;
    }
    for (int64_t i = 0; i < size; ++i) {
      tails[begin + i] = {static_cast<double>(counts[i / kLanes][i % kLanes]), sums[i / kLanes][i % kLanes]};
    }
  }
}

}  // namespace cctorch::simd::CCTORCH_ISA
