#include "csrc/ops/cpu/simd/mask.h"

#include <type_traits>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "csrc/ops/formula/mask.h"

namespace cctorch::simd::CCTORCH_ISA {
namespace {

template <typename Bits>
using Signed = std::make_signed_t<Bits>;

template <typename Bits>
CCTORCH_HOST_DEVICE Signed<Bits> key(Bits bits) {
  return static_cast<Signed<Bits>>(formula::magnitude(bits));
}

// Few groups have a magnitude inside: vectors look for them, and only those groups are gone through.
template <typename Bits>
int64_t gather(const Bits* weight, int64_t n, Signed<Bits> low, Signed<Bits> high, Bits* inside) {
  constexpr int64_t kGroup = 64 / sizeof(Bits);
  int64_t count = 0;
  const auto gather_from = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Signed<Bits> k = key(weight[i]);
      inside[count] = static_cast<Bits>(k);
      count += k > low && k < high;
    }
  };
  int64_t begin = 0;
  for (; begin + kGroup <= n; begin += kGroup) {
    Bits found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t i = 0; i < kGroup; ++i) {
      const Signed<Bits> k = key(weight[begin + i]);
      found |= k > low && k < high ? Bits(1) : Bits(0);
    }
    if (found) gather_from(begin, begin + kGroup);
  }
  gather_from(begin, n);
  return count;
}

#ifdef __AVX512F__
int64_t gather(const uint32_t* weight, int64_t n, int32_t low, int32_t high, uint32_t* inside) {
  constexpr int64_t kGroup = 16;
  const __m512i magnitudes = _mm512_set1_epi32(0x7fffffff);
  const __m512i lows = _mm512_set1_epi32(low);
  const __m512i highs = _mm512_set1_epi32(high);
  int64_t count = 0;
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) {
    const __m512i keys = _mm512_and_si512(_mm512_loadu_si512(weight + i), magnitudes);
    const __mmask16 found = _mm512_mask_cmplt_epi32_mask(_mm512_cmpgt_epi32_mask(keys, lows), keys, highs);
    // Lanes behind the found ones are overwritten by the next.
    _mm512_storeu_si512(inside + count, _mm512_maskz_compress_epi32(found, keys));
    count += __builtin_popcount(found);
  }
  return count + gather<uint32_t>(weight + i, n - i, low, high, inside + count);
}
#endif

template <typename Bits>
Split<Bits> split(const Bits* weight, int64_t n, Bits low_bits, Bits high_bits, Bits* inside) {
  const auto low = static_cast<Signed<Bits>>(low_bits);
  const auto high = static_cast<Signed<Bits>>(high_bits);
  Bits above = 0;
  Bits at_high = 0;
  Bits at_low = 0;
  Signed<Bits> largest = 0;
#pragma omp simd reduction(+ : above, at_high, at_low) reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const Signed<Bits> k = key(weight[i]);
    above += k > high ? Bits(1) : Bits(0);
    at_high += k == high ? Bits(1) : Bits(0);
    at_low += k == low ? Bits(1) : Bits(0);
    largest = k > largest ? k : largest;
  }
  const int64_t count = gather(weight, n, low, high, inside);
  return {static_cast<int64_t>(above), static_cast<int64_t>(at_high), count,
          low == high ? 0 : static_cast<int64_t>(at_low), static_cast<Bits>(largest)};
}

template <typename Bits>
int64_t mark(bool* mask, const Bits* weight, int64_t n, Bits least_bits) {
  const auto least = static_cast<Signed<Bits>>(least_bits);
  Bits equal = 0;
#pragma omp simd reduction(+ : equal)
  for (int64_t i = 0; i < n; ++i) {
    const Signed<Bits> k = key(weight[i]);
    mask[i] = k >= least;
    equal += k == least ? Bits(1) : Bits(0);
  }
  return equal;
}

template <typename Bits>
int64_t prune(Bits* pruned, const Bits* weight, int64_t n, Bits least_bits) {
  const auto least = static_cast<Signed<Bits>>(least_bits);
  Bits equal = 0;
#pragma omp simd reduction(+ : equal)
  for (int64_t i = 0; i < n; ++i) {
    const Bits bits = weight[i];
    const Signed<Bits> k = key(bits);
    pruned[i] = k >= least ? bits : Bits(0);
    equal += k == least ? Bits(1) : Bits(0);
  }
  return equal;
}

template <typename Bits>
void apply(Bits* y, const Bits* weight, const bool* mask, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = weight[i] & static_cast<Bits>(-static_cast<Signed<Bits>>(mask[i]));
}

template <typename Bits>
int64_t nonzero(const Bits* weight, int64_t n) {
  Bits count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += key(weight[i]) != 0 ? Bits(1) : Bits(0);
  return static_cast<int64_t>(count);
}

// The first elements of many groups beside each other, then the second ones, and so on: comparisons fill vectors.
template <typename Bits>
struct Planes {
  static constexpr int64_t kMost = 16;
  static constexpr int64_t kGroups = 64 / sizeof(Bits) * 4;
  Signed<Bits> keys[kMost][kGroups];
  bool kept[kMost][kGroups];

  // As formula::mark_group, of all of them.
  void mark(int64_t n, int64_t m) {
    for (int64_t i = 0; i < m; ++i) {
      Signed<Bits> before[kGroups] = {};
      for (int64_t j = 0; j < m; ++j) {
        // A key is no larger than another minus one just where it is smaller: keys are not negative.
        const Signed<Bits> tie = j < i ? 1 : 0;
#pragma omp simd
        for (int64_t g = 0; g < kGroups; ++g) before[g] += keys[j][g] > keys[i][g] - tie ? 1 : 0;
      }
#pragma omp simd
      for (int64_t g = 0; g < kGroups; ++g) kept[i][g] = before[g] < static_cast<Signed<Bits>>(n);
    }
  }
};

template <typename Bits>
void groups(bool* mask, const Bits* weight, int64_t count, int64_t n, int64_t m, int64_t inner) {
  if (m > Planes<Bits>::kMost) {
    for (int64_t group = 0; group < count; ++group) {
      const int64_t offset = group / inner * m * inner + group % inner;
      formula::mark_group(weight + offset, mask + offset, n, m, inner,
                          [](Bits bits) { return formula::magnitude(bits); });
    }
    return;
  }
  Planes<Bits> planes = {};
  int64_t outer = 0;
  int64_t within = 0;
  for (int64_t begin = 0; begin < count; begin += Planes<Bits>::kGroups) {
    const int64_t size = count - begin < Planes<Bits>::kGroups ? count - begin : Planes<Bits>::kGroups;
    int64_t offsets[Planes<Bits>::kGroups];
    for (int64_t g = 0; g < size; ++g) {
      offsets[g] = outer + within;
      if (++within < inner) continue;
      within = 0;
      outer += m * inner;
    }
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t g = 0; g < size; ++g) planes.keys[i][g] = key(weight[offsets[g] + i * inner]);
    }
    planes.mark(n, m);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t g = 0; g < size; ++g) mask[offsets[g] + i * inner] = planes.kept[i][g];
    }
  }
}

}  // namespace

template <typename Bits>
MaskLoops<Bits> mask_loops() {  // NOLINT(misc-use-internal-linkage): mask.h declares it
  return {&split<Bits>, &mark<Bits>, &prune<Bits>, &apply<Bits>, &nonzero<Bits>, &groups<Bits>};
}

template MaskLoops<uint16_t> mask_loops();
template MaskLoops<uint32_t> mask_loops();
template MaskLoops<uint64_t> mask_loops();

}  // namespace cctorch::simd::CCTORCH_ISA
