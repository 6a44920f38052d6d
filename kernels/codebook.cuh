#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/ops/formula/codebook.h"
#include "kernels/block.cuh"
#include "kernels/vector.cuh"

// Codebooks, of which each block sorts its own: they are short. The bodies are those of Together (kernels/list.cuh).
namespace cctorch::cuda::codebook {

// A thread for each value.
constexpr int kMostValues = kThreads;

// In ascending order. What is not up to a bound, as NaN, is above it.
template <typename T>
struct Ascending {
  T given[kMostValues];
  T values[kMostValues];
  T bounds[kMostValues];
  int order[kMostValues];  // of each its place in the codebook

  // Called by all threads of the block.
  __device__ void sort(const T* codebook, int count) {
    const int own = static_cast<int>(threadIdx.x);
    if (own < count) given[own] = codebook[own];
    __syncthreads();
    if (own < count) {
      int place = 0;
      for (int other = 0; other < count; ++other) {
        const bool is_before = formula::comes_before(given[other], given[own]);
        place += is_before || (other < own && !formula::comes_before(given[own], given[other])) ? 1 : 0;
      }
      values[place] = given[own];
      order[place] = own;
    }
    __syncthreads();
    if (own + 1 < count) bounds[own] = formula::bound_between(values[own], values[own + 1]);
    __syncthreads();
  }

  __device__ int cell(T x, int count) const {
    int low = 0;
    for (int high = values[0] == values[0] ? count - 1 : 0; low < high;) {
      const int middle = (low + high) / 2;
      if (x <= bounds[middle]) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
};

// What the bodies go over: a block takes `span` elements of a tensor.
template <typename S, typename T>
struct Part {
  const S* x;
  const T* codebook;
  int64_t size;
  int64_t span;
  int count;

  int64_t blocks() const { return ceil_div(size, span); }
  __device__ int64_t begin(int64_t block) const { return block * span; }
  __device__ int64_t end(int64_t block) const { return std::min((block + 1) * span, size); }
};

// y = the nearest value; NaN stays.
template <typename S, typename T>
struct Quantize : Part<S, T> {
  struct Shared {
    Ascending<T> book;
  };
  S* y;

  __device__ void operator()(Shared& shared, int64_t block) const {
    shared.book.sort(this->codebook, this->count);
    map_all(y, this->x, this->begin(block), this->end(block), [&](S value) {
      const T number = static_cast<T>(value);
      return number == number ? static_cast<S>(shared.book.values[shared.book.cell(number, this->count)]) : value;
    });
  }
};

// The places of the nearest values in the codebook.
template <typename S, typename T>
struct Indices : Part<S, T> {
  struct Shared {
    Ascending<T> book;
  };
  int64_t* places;

  __device__ void operator()(Shared& shared, int64_t block) const {
    shared.book.sort(this->codebook, this->count);
    for (int64_t i = this->begin(block) + threadIdx.x; i < this->end(block); i += kThreads) {
      places[i] = shared.book.order[shared.book.cell(static_cast<T>(this->x[i]), this->count)];
    }
  }
};

// Of each value of the codebook, in ascending order, the sum of those of `values` whose x is nearest to it, and how
// many they are: of each block, one after the other. Each thread has sums of its own, of a few cells at once, so that
// they are the same each time.
template <typename S, typename T>
struct Sums : Part<S, T> {
  static constexpr int kCells = 16;
  struct Shared {
    Ascending<T> book;
    double sums[kCells][kThreads];
    unsigned counts[kMostValues];
  };
  const S* values;
  double* sums;      // blocks x count
  unsigned* counts;  // blocks x count

  __device__ void operator()(Shared& shared, int64_t block) const {
    const int own = static_cast<int>(threadIdx.x), count = this->count;
    if (own < count) shared.counts[own] = 0;
    shared.book.sort(this->codebook, count);
    for (int first = 0; first < count; first += kCells) {
      for (int k = 0; k < kCells; ++k) shared.sums[k][own] = 0;
      const auto add = [&](S x, S value) {
        const int cell = shared.book.cell(static_cast<T>(x), count) - first;
        if (cell < 0 || cell >= kCells) return;
        shared.sums[cell][own] += static_cast<double>(value);
        atomicAdd(&shared.counts[first + cell], 1u);
      };
      add_all(this->begin(block), this->end(block), add);
      __syncthreads();
      for (int k = own / kWarp; k < kCells && first + k < count; k += kWarps) {
        double sum = 0;
        for (unsigned thread = own % kWarp; thread < kThreads; thread += kWarp) sum += shared.sums[k][thread];
        sum = warp_sum(sum);
        if (own % kWarp == 0) sums[block * count + first + k] = sum;
      }
      __syncthreads();  // the sums are cleared for the next cells
    }
    if (own < count) counts[block * count + own] = shared.counts[own];
  }

  template <typename Add>
  __device__ void add_all(int64_t begin, int64_t end, const Add& add) const {
    const S *x = this->x, *its = values;
    constexpr int kCount = kVector<S>;
    const int64_t first = std::min(first_vector(x, begin), end);
    const int64_t last = are_aligned<kCount>(its + first) ? first + (end - first) / kCount * kCount : first;
    if (begin + threadIdx.x < first) add(x[begin + threadIdx.x], its[begin + threadIdx.x]);
    for_each_vector(x, first, last, [&](const auto& vectors, int64_t i) {
      CCTORCH_UNROLL
      for (int k = 0; k < vectors.kCount; ++k) {
        const auto pack = load<kCount>(its + i + k * int64_t(kThreads) * kCount);
        CCTORCH_UNROLL
        for (int j = 0; j < kCount; ++j) add(vectors.packs[k].values[j], pack.values[j]);
      }
    });
    CCTORCH_KEEP_LOOP
    for (int64_t i = last + threadIdx.x; i < end; i += kThreads) add(x[i], its[i]);
  }
};

// Puts the sums of a tensor's blocks together, in their order, for each value of the codebook in its own place: their
// sum, or, if that is asked for, their mean, and the value itself where there are none.
template <typename T>
struct Total {
  struct Shared {
    Ascending<T> book;
  };
  const T* codebook;
  T* to;
  const double* sums;
  const unsigned* counts;
  int64_t parts;
  int count;
  bool mean;

  int64_t blocks() const { return 1; }

  __device__ void operator()(Shared& shared, int64_t) const {
    shared.book.sort(codebook, count);
    const int own = static_cast<int>(threadIdx.x);
    if (own >= count) return;
    double sum = 0;
    int64_t members = 0;
    for (int64_t part = 0; part < parts; ++part) {
      sum += sums[part * count + own];
      members += counts[part * count + own];
    }
    const bool stays = mean && members == 0;
    const double divisor = mean && members > 0 ? static_cast<double>(members) : 1.0;
    to[shared.book.order[own]] = stays ? shared.book.values[own] : static_cast<T>(sum / divisor);
  }
};

}  // namespace cctorch::cuda::codebook
