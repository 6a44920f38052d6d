#include "csrc/ops/cpu/simd/codebook.h"

#include "csrc/ops/cpu/simd/reader.h"

namespace cctorch::simd::CCTORCH_ISA {
namespace {

// Up to so many values all bounds are compared, without a branch or a load that depends on x; beyond that a binary
// search takes fewer steps.
constexpr int64_t kFewValues = 96;

template <typename T>
struct Vectors;
template <>
struct Vectors<float> {
  using Values = float __attribute__((vector_size(64)));
  using Bits = int32_t __attribute__((vector_size(64)));
};
template <>
struct Vectors<double> {
  using Values = double __attribute__((vector_size(64)));
  using Bits = int64_t __attribute__((vector_size(64)));
};

#ifdef __AVX512F__
constexpr int64_t kAtOnce = 4;  // vectors
#else
constexpr int64_t kAtOnce = 2;
#endif

// function(x, begin) of kAtOnce vectors, the last ones filled up with zeros.
template <typename T, typename Function>
void for_vectors(const T* x, int64_t n, const Function& function) {
  using Values = typename Vectors<T>::Values;
  constexpr int64_t kStep = kAtOnce * 64 / static_cast<int64_t>(sizeof(T));
  Values loaded[kAtOnce];
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    __builtin_memcpy(loaded, x + i, sizeof(loaded));
    function(loaded, i, kStep);
  }
  if (i == n) return;
  for (int64_t j = 0; j < kAtOnce; ++j) loaded[j] = Values{};
  __builtin_memcpy(loaded, x + i, (n - i) * sizeof(T));
  function(loaded, i, n - i);
}

template <typename T>
void few_values(T* y, const T* x, int64_t n, const T* values, const T* bounds, int64_t count) {
  using Values = typename Vectors<T>::Values;
  for_vectors(x, n, [&](const Values* own, int64_t begin, int64_t size) {
    Values found[kAtOnce];
    for (int64_t k = 0; k < kAtOnce; ++k) found[k] = values[0] - Values{};
    for (int64_t j = 1; j < count; ++j) {
      const Values bound = bounds[j - 1] - Values{};
      const Values value = values[j] - Values{};
      for (int64_t k = 0; k < kAtOnce; ++k) found[k] = own[k] <= bound ? found[k] : value;
    }
    for (int64_t k = 0; k < kAtOnce; ++k) found[k] = own[k] == own[k] ? found[k] : own[k];
    __builtin_memcpy(y + begin, found, size * sizeof(T));
  });
}

template <typename T>
void few_cells(int32_t* cells, const T* x, int64_t n, const T* bounds, int64_t count) {
  using Values = typename Vectors<T>::Values;
  using Bits = typename Vectors<T>::Bits;
  for_vectors(x, n, [&](const Values* own, int64_t begin, int64_t size) {
    Bits up_to[kAtOnce] = {};
    for (int64_t j = 1; j < count; ++j) {
      const Values bound = bounds[j - 1] - Values{};
      for (int64_t k = 0; k < kAtOnce; ++k) up_to[k] += own[k] <= bound;
    }
    constexpr int64_t kLanes = 64 / static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < size; ++i) {
      cells[begin + i] = static_cast<int32_t>(count - 1 + up_to[i / kLanes][i % kLanes]);
    }
  });
}

// How many bounds are below, of a number of them that is filled up to a power of two less one.
template <typename T>
void search(int32_t* cells, const T* x, int64_t n, const T* bounds, int64_t count) {
  int32_t half = 1;
  while (2 * half < count) half *= 2;
  for (int64_t i = 0; i < n; ++i) cells[i] = 0;
  for (int32_t step = half; step > 0; step /= 2) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) cells[i] += x[i] <= bounds[cells[i] + step - 1] ? 0 : step;
  }
  const auto last = static_cast<int32_t>(count - 1);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) cells[i] = cells[i] < last ? cells[i] : last;
}

template <typename T>
void cells_of(int32_t* cells, const T* x, int64_t n, const Codebook& book) {
  const T* bounds = static_cast<const T*>(book.bounds);
  if (book.count <= kFewValues) {
    few_cells(cells, x, n, bounds, book.count);
  } else {
    search(cells, x, n, bounds, book.count);
  }
}

template <typename S, typename T>
void quantize(void* y, const void* x, int64_t n, const Codebook& book, Stores stores) {
  const T* values = static_cast<const T*>(book.values);
  Reader<S, T> read_x;
  Writer<S, T> write_y(stores);
  int32_t found[kTile];
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t size = tile_size(begin, n);
    const T* xs = read_x(x, begin, size);
    T* ys = write_y.tile(y, begin);
    if (book.count <= kFewValues) {
      few_values(ys, xs, size, values, static_cast<const T*>(book.bounds), book.count);
    } else {
      cells_of(found, xs, size, book);
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) ys[i] = xs[i] == xs[i] ? values[found[i]] : xs[i];
    }
    write_y.flush(y, begin, size);
  }
}

template <typename S, typename T>
void cells(int32_t* to, const void* x, int64_t n, const Codebook& book) {
  Reader<S, T> read_x;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t size = tile_size(begin, n);
    cells_of(to + begin, read_x(x, begin, size), size, book);
  }
}

template <typename S, typename T>
void add(const void* values, const void* x, int64_t n, const Codebook& book, double* sums, int64_t* counts) {
  Reader<S, T> read_x;
  Reader<S, T> read_value;
  int32_t found[kTile];
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t size = tile_size(begin, n);
    cells_of(found, read_x(x, begin, size), size, book);
    const T* vs = read_value(values, begin, size);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t place = i % kCopies * book.count + found[i];
      sums[place] += static_cast<double>(vs[i]);
      ++counts[place];
    }
  }
}

template <typename S, typename T>
constexpr CodebookLoops of{&quantize<S, T>, &cells<S, T>, &add<S, T>};

}  // namespace

CodebookLoops codebook_loops(Storage storage) {
  return with_types(storage, []<typename S, typename T>() { return of<S, T>; });
}

}  // namespace cctorch::simd::CCTORCH_ISA
