#include "csrc/ops/cpu/simd/norms.h"

#include "csrc/ops/cpu/simd/reader.h"

namespace cctorch::simd::CCTORCH_ISA {
namespace {

template <typename S, typename T>
double square(const void* a, int64_t n) {
  Reader<S, T> read;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t size = tile_size(begin, n);
    const T* values = read(a, begin, size);
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < size; ++i) total += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  }
  return total;
}

template <typename S, typename T>
double squared_distance(const void* a, const void* b, int64_t n) {
  Reader<S, T> read_a;
  Reader<S, T> read_b;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t size = tile_size(begin, n);
    const T* from = read_a(a, begin, size);
    const T* to = read_b(b, begin, size);
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < size; ++i) {
      const double difference = static_cast<double>(from[i]) - static_cast<double>(to[i]);
      total += difference * difference;
    }
  }
  return total;
}

template <typename S, typename T>
void add_squares(const void* a, int64_t n, double* sums) {
  Reader<S, T> read;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t size = tile_size(begin, n);
    const T* values = read(a, begin, size);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      sums[begin + i] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
    }
  }
}

template <typename S, typename T>
constexpr Norms of{&square<S, T>, &squared_distance<S, T>, &add_squares<S, T>};

}  // namespace

Norms norms(Storage storage) {
  return with_types(storage, []<typename S, typename T>() { return of<S, T>; });
}

}  // namespace cctorch::simd::CCTORCH_ISA
