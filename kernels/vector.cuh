#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "csrc/ops/formula/layout.h"
#include "kernels/block.cuh"

// Registers are an array only as long as every index into it is known when the code is compiled. And there are not
// enough of them for what the compiler makes of a long loop whose body is many elements already.
#ifdef __CUDACC__
#define CCTORCH_UNROLL _Pragma("unroll")
#define CCTORCH_UNROLL_4 _Pragma("unroll 4")
#define CCTORCH_KEEP_LOOP _Pragma("unroll 1")
#else
#define CCTORCH_UNROLL
#define CCTORCH_UNROLL_4
#define CCTORCH_KEEP_LOOP
#endif

// The 16 bytes that one instruction loads or stores.
namespace cctorch::cuda {

template <typename S>
constexpr int kVector = 16 / sizeof(S);

// Vectors that a thread loads before it uses the first: memory answers late. The elements of more would not fit into
// registers.
template <typename S>
constexpr int kInFlight = kVector<S> == 8 ? 2 : 4;

template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T values[count];
};

// What is loaded or stored as one: the compiler may take the copy of a struct apart.
template <int bytes>
using Word = std::conditional_t<
    bytes == 16, uint4,
    std::conditional_t<bytes == 8, unsigned long long, std::conditional_t<bytes == 4, unsigned, unsigned short>>>;

// Of memory that the kernel does not write.
template <int count, typename T>
__device__ Pack<T, count> load(const T* from) {
  const auto word = __ldg(reinterpret_cast<const Word<sizeof(T) * count>*>(from));
  Pack<T, count> pack;
  memcpy(&pack, &word, sizeof(pack));
  return pack;
}

template <typename T, int count>
__device__ void store(T* to, const Pack<T, count>& pack) {
  Word<sizeof(T) * count> word;
  memcpy(&word, &pack, sizeof(pack));
  __stcg(reinterpret_cast<decltype(word)*>(to), word);
}

// Whether packs of `count` can be loaded from there. Tensors begin at such addresses; views of their parts need not.
template <int count, typename... T>
CCTORCH_HOST_DEVICE bool are_aligned(const T*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % (sizeof(T) * count) == 0) && ...);
}

// Of the elements from `begin` on, the first where a vector begins.
template <typename T>
__device__ int64_t first_vector(const T* from, int64_t begin) {
  const auto position = static_cast<int64_t>(reinterpret_cast<uintptr_t>(from + begin) / sizeof(T));
  return begin + ceil_div(position, int64_t(kVector<T>)) * kVector<T> - position;
}

// `count` vectors, `step` elements apart.
template <int count, typename T>
struct Vectors {
  static constexpr int kCount = count;
  Pack<T, kVector<T>> packs[count];

  __device__ Vectors(const T* from, int64_t step) {
    CCTORCH_UNROLL
    for (int k = 0; k < count; ++k) packs[k] = load<kVector<T>>(from + k * step);
  }
};

// each(vectors, index) for all vectors of [first, last), shared among the threads of the block: as many at once as are
// in flight, then one by one.
template <typename T, typename Each>
__device__ void for_each_vector(const T* from, int64_t first, int64_t last, const Each& each) {
  constexpr int64_t kStep = kThreads * kVector<T>;
  int64_t i = first + threadIdx.x * kVector<T>;
  CCTORCH_KEEP_LOOP
  for (; i + (kInFlight<T> - 1) * kStep < last; i += kInFlight<T> * kStep) {
    each(Vectors<kInFlight<T>, T>(from + i, kStep), i);
  }
  CCTORCH_KEEP_LOOP
  for (; i < last; i += kStep) each(Vectors<1, T>(from + i, kStep), i);
}

// visit(value) for each of the elements [begin, end), shared among the threads of the block. Vectors where there are
// any.
template <typename T, typename Visit>
__device__ void visit_all(const T* from, int64_t begin, int64_t end, const Visit& visit) {
  const int64_t first = std::min(first_vector(from, begin), end);
  const int64_t last = first + (end - first) / kVector<T> * kVector<T>;
  if (begin + threadIdx.x < first) visit(from[begin + threadIdx.x]);
  for_each_vector(from, first, last, [&](const auto& vectors, int64_t) {
    CCTORCH_UNROLL
    for (int k = 0; k < vectors.kCount; ++k) {
      CCTORCH_UNROLL
      for (int j = 0; j < kVector<T>; ++j) visit(vectors.packs[k].values[j]);
    }
  });
  if (last + threadIdx.x < end) visit(from[last + threadIdx.x]);
}

// to[i] = map(from[i]) for each i in [begin, end), in the same way. Single elements where `to` does not begin at a
// vector's size together with `from`.
template <typename To, typename From, typename Map>
__device__ void map_all(To* to, const From* from, int64_t begin, int64_t end, const Map& map) {
  constexpr int kCount = kVector<From>;
  const int64_t first = std::min(first_vector(from, begin), end);
  const int64_t last = are_aligned<kCount>(to + first) ? first + (end - first) / kCount * kCount : first;
  if (begin + threadIdx.x < first) to[begin + threadIdx.x] = map(from[begin + threadIdx.x]);
  for_each_vector(from, first, last, [&](const auto& vectors, int64_t i) {
    CCTORCH_UNROLL
    for (int k = 0; k < vectors.kCount; ++k) {
      Pack<To, kCount> result;
      CCTORCH_UNROLL
      for (int j = 0; j < kCount; ++j) result.values[j] = map(vectors.packs[k].values[j]);
      store(to + i + k * int64_t(kThreads) * kCount, result);
    }
  });
  CCTORCH_KEEP_LOOP
  for (int64_t i = last + threadIdx.x; i < end; i += kThreads) to[i] = map(from[i]);
}

}  // namespace cctorch::cuda
