#pragma once

#include <immintrin.h>

#include <cstdint>

#include "csrc/ops/cpu/simd/half.h"
#include "csrc/ops/cpu/simd/loops.h"
#include "csrc/ops/cpu/simd/stores.h"

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

// function.operator()<S, T>() of the storage's type and that of its arithmetic.
template <typename Function>
auto with_types(Storage storage, const Function& function) {
  switch (storage) {
    case Storage::kDouble:
      return function.template operator()<double, double>();
    case Storage::kHalf:
      return function.template operator()<Half, float>();
    case Storage::kBFloat16:
      return function.template operator()<BFloat16, float>();
    default:
      return function.template operator()<float, float>();
  }
}

// n numbers from `from`, written around the caches: what is larger than they are would push everything else out, and
// each line would be read before it is written.
template <typename S>
void stream(const S* from, S* to, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(S);
  const auto misplaced = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) / sizeof(S)) % kLine;
  const int64_t head = misplaced == 0 ? 0 : kLine - misplaced;
  int64_t i = 0;
  for (; i < head && i < n; ++i) to[i] = from[i];
  for (; i + kLine <= n; i += kLine) {
#ifdef __AVX512F__
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#elif defined(__AVX__)
    for (int64_t part = 0; part < kLine; part += kLine / 2) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + part),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i + part)));
    }
#else
    for (int64_t part = 0; part < kLine; part += kLine / 4) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + part),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i + part)));
    }
#endif
  }
  for (; i < n; ++i) to[i] = from[i];
}

// Where a loop writes a tile: the destination itself, or a buffer that is converted, or streamed, from there.
template <typename S, typename T>
class Writer {
 public:
  explicit Writer(Stores stores = Stores::kThroughCaches) : streams_(stores == Stores::kAroundCaches) {}

  T* tile(void* to, int64_t begin) {
    if constexpr (kConverts) {
      return buffer_;
    } else {
      return streams_ ? buffer_ : static_cast<T*>(to) + begin;
    }
  }

  void flush(void* to, int64_t begin, int64_t n) {
    S* out = static_cast<S*>(to) + begin;
    if constexpr (kConverts) {
      from_float(buffer_, streams_ ? converted_ : out, n);
      if (streams_) stream(converted_, out, n);
    } else {
      if (streams_) stream(buffer_, out, n);
    }
  }

 private:
  static constexpr bool kConverts = !__is_same(S, T);

  bool streams_;
  T buffer_[kTile];
  S converted_[kConverts ? kTile : 1];
};

}  // namespace cctorch::simd::CCTORCH_ISA
