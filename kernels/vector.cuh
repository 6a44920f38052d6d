#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "csrc/ops/formula/host_device.h"

// Registers are an array only as long as every index into it is known when the code is compiled. And there are not
// enough of them for what the compiler makes of a long loop whose body is many elements already.
#ifdef __CUDACC__
#define CCTORCH_UNROLL _Pragma("unroll")
#define CCTORCH_KEEP_LOOP _Pragma("unroll 1")
#else
#define CCTORCH_UNROLL
#define CCTORCH_KEEP_LOOP
#endif

// The 16 bytes that one instruction loads or stores.
namespace cctorch::cuda {

template <typename S>
constexpr int kVector = 16 / sizeof(S);

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

}  // namespace cctorch::cuda
