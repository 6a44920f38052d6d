#pragma once

#include <cstdint>

#include "csrc/ops/cpu/simd/half.h"

namespace cctorch::simd::CCTORCH_ISA {

constexpr int64_t kTile = 512;

inline int64_t tile_size(int64_t begin, int64_t n) { return n - begin < kTile ? n - begin : kTile; }

// A tile of values in the type of the arithmetic: the storage itself where the types agree, else a converted copy.
template <typename S, typename T>
struct Reader {
  T buffer[kTile];
  const T* operator()(const void* from, int64_t begin, int64_t n) {
    to_float(static_cast<const S*>(from) + begin, buffer, n);
    return buffer;
  }
};

template <typename T>
struct Reader<T, T> {
  const T* operator()(const void* from, int64_t begin, int64_t) { return static_cast<const T*>(from) + begin; }
};

template <typename S, typename T>
struct Writer {
  T buffer[kTile];
  T* tile(void*, int64_t) { return buffer; }
  void flush(void* to, int64_t begin, int64_t n) { from_float(buffer, static_cast<S*>(to) + begin, n); }
};

template <typename T>
struct Writer<T, T> {
  T* tile(void* to, int64_t begin) { return static_cast<T*>(to) + begin; }
  void flush(void*, int64_t, int64_t) {}
};

}  // namespace cctorch::simd::CCTORCH_ISA
