#include "csrc/ops/cpu/simd/decay_noise.h"

#include "csrc/ops/cpu/simd/reader.h"

namespace cctorch::simd::CCTORCH_ISA {
namespace {

template <typename S, typename T>
void scale(const void* x, void* y, int64_t n, double factor) {
  Reader<S, T> read;
  Writer<S, T> write;
  const T by = static_cast<T>(factor);
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t size = tile_size(begin, n);
    const T* from = read(x, begin, size);
    T* to = write.tile(y, begin);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) to[i] = from[i] * by;
    write.flush(y, begin, size);
  }
}

// 2 u - 1 of the u in [0, 1) that at::rand makes of a word, or two: exact.
template <typename S>
void symmetric(const uint32_t* words, float* u, int64_t n) {
  constexpr int digits = __is_same(S, float) ? 24 : __is_same(S, Half) ? 11 : 8;
  constexpr uint32_t half = 1U << (digits - 1);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    u[i] = static_cast<float>(static_cast<int32_t>((words[i] & (2 * half - 1)) - half)) * (1.0F / half);
  }
}

template <typename S>
void symmetric(const uint32_t* words, double* u, int64_t n) {
  constexpr uint64_t half = uint64_t{1} << 52;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t both = static_cast<uint64_t>(words[2 * i]) << 32 | words[2 * i + 1];
    u[i] = static_cast<double>(static_cast<int64_t>((both & (2 * half - 1)) - half)) * (1.0 / half);
  }
}

template <typename S, typename T>
void add_uniform(const void* x, void* y, int64_t n, const uint32_t* words, double amplitude) {
  constexpr int64_t words_each = __is_same(S, double) ? 2 : 1;
  const T by = static_cast<T>(amplitude);
  Reader<S, T> read;
  Reader<S, T> read_noise;
  Writer<S, T> write;
  S stored[kTile];
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t size = tile_size(begin, n);
    // The product is rounded to the storage's type before it is added: stored, and no fused multiply-add.
    Writer<S, T> write_noise;
    T* noise = write_noise.tile(stored, 0);
    symmetric<S>(words + words_each * begin, noise, size);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) noise[i] *= by;
    write_noise.flush(stored, 0, size);
    const T* moves = read_noise(stored, 0, size);
    const T* from = read(x, begin, size);
    T* to = write.tile(y, begin);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) to[i] = from[i] + moves[i];
    write.flush(y, begin, size);
  }
}

template <typename S, typename T>
constexpr DecayNoise of{&scale<S, T>, &add_uniform<S, T>};

}  // namespace

DecayNoise decay_noise(Storage storage) {
  return with_types(storage, []<typename S, typename T>() { return of<S, T>; });
}

}  // namespace cctorch::simd::CCTORCH_ISA
