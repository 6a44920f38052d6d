#include "csrc/ops/cpu/simd/mask.h"

#include <algorithm>
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
  static constexpr int64_t kShort = 16;  // what is copied for a run of fewer: copies of a fixed size are quick
  Signed<Bits> keys[kMost][kGroups + kShort];
  bool kept[kMost][kGroups + kShort];

  // As formula::mark_group, of all of them. Returns the largest key.
  Signed<Bits> mark(int64_t n, int64_t m) {
    Signed<Bits> largest[kGroups] = {};
    for (int64_t i = 0; i < m; ++i) {
      Signed<Bits> before[kGroups] = {};
      for (int64_t j = 0; j < m; ++j) {
        // A key is no larger than another minus one just where it is smaller: keys are not negative.
        const Signed<Bits> tie = j < i ? 1 : 0;
#pragma omp simd
        for (int64_t g = 0; g < kGroups; ++g) before[g] += keys[j][g] > keys[i][g] - tie ? 1 : 0;
      }
#pragma omp simd
      for (int64_t g = 0; g < kGroups; ++g) {
        kept[i][g] = before[g] < static_cast<Signed<Bits>>(n);
        largest[g] = keys[i][g] > largest[g] ? keys[i][g] : largest[g];
      }
    }
    Signed<Bits> result = 0;
#pragma omp simd reduction(max : result)
    for (int64_t g = 0; g < kGroups; ++g) result = largest[g] > result ? largest[g] : result;
    return result;
  }
};

// Groups of M neighbours.
template <int64_t M, typename Bits>
Signed<Bits> neighbours(bool* mask, const Bits* weight, int64_t count, int64_t n) {
  Planes<Bits> planes = {};
  Signed<Bits> largest = 0;
  const auto some = [&](int64_t begin, int64_t size) {
    const Bits* from = weight + begin * M;
    bool* to = mask + begin * M;
    for (int64_t g = 0; g < size; ++g) {
      for (int64_t i = 0; i < M; ++i) planes.keys[i][g] = key(from[g * M + i]);
    }
    largest = std::max(largest, planes.mark(n, M));
    for (int64_t g = 0; g < size; ++g) {
      for (int64_t i = 0; i < M; ++i) to[g * M + i] = planes.kept[i][g];
    }
  };
  int64_t begin = 0;
  for (; begin + Planes<Bits>::kGroups <= count; begin += Planes<Bits>::kGroups) some(begin, Planes<Bits>::kGroups);
  if (begin == count) return largest;
  planes = {};
  some(begin, count - begin);
  return largest;
}

// Groups of m elements that are `inner` apart: beside each other they lie in runs. What a short run copies too much is
// overwritten by the next, in the planes as in the mask; so short runs are not divided.
template <typename Bits>
Signed<Bits> strided(bool* mask, const Bits* weight, int64_t count, int64_t n, int64_t m, int64_t inner) {
  struct Run {
    int64_t from, to, size;
  };
  Planes<Bits> planes = {};
  Run runs[Planes<Bits>::kGroups];
  constexpr int64_t kShort = Planes<Bits>::kShort;
  const auto each = [&](const Run& run, int64_t offset, const auto& copy) {
    if (inner <= kShort && offset + kShort <= count * m) {
#pragma omp simd
      for (int64_t g = 0; g < kShort; ++g) copy(g);
    } else {
#pragma omp simd
      for (int64_t g = 0; g < run.size; ++g) copy(g);
    }
  };
  Signed<Bits> largest = 0;
  int64_t outer = 0;
  int64_t within = 0;
  const int64_t whole = inner <= kShort ? inner : 1;
  const int64_t at_once = Planes<Bits>::kGroups / whole * whole;
  for (int64_t begin = 0; begin < count; begin += at_once) {
    const int64_t size = std::min(count - begin, at_once);
    if (size < Planes<Bits>::kGroups) planes = {};
    int64_t number = 0;
    for (int64_t to = 0; to < size; ++number) {
      const Run run{outer + within, to, std::min(inner - within, size - to)};
      runs[number] = run;
      for (int64_t i = 0; i < m; ++i) {
        const Bits* from = weight + run.from + i * inner;
        Signed<Bits>* keys = planes.keys[i] + run.to;
        each(run, run.from + i * inner, [&](int64_t g) { keys[g] = key(from[g]); });
      }
      to += run.size;
      within += run.size;
      if (within < inner) continue;
      within = 0;
      outer += m * inner;
    }
    largest = std::max(largest, planes.mark(n, m));
    for (int64_t r = 0; r < number; ++r) {
      for (int64_t i = 0; i < m; ++i) {
        bool* to = mask + runs[r].from + i * inner;
        const bool* kept = planes.kept[i] + runs[r].to;
        each(runs[r], runs[r].from + i * inner, [&](int64_t g) { to[g] = kept[g]; });
      }
    }
  }
  return largest;
}

template <typename Bits>
Bits one_by_one(bool* mask, const Bits* weight, int64_t count, int64_t n, int64_t m, int64_t inner) {
  Bits largest = 0;
  for (int64_t group = 0; group < count; ++group) {
    const int64_t offset = group / inner * m * inner + group % inner;
    formula::mark_group(weight + offset, mask + offset, n, m, inner, [&](Bits bits) {
      const Bits magnitude = formula::magnitude(bits);
      largest = std::max(largest, magnitude);
      return magnitude;
    });
  }
  return largest;
}

template <typename Bits>
Bits groups(bool* mask, const Bits* weight, int64_t count, int64_t n, int64_t m, int64_t inner) {
  if (m > Planes<Bits>::kMost) return one_by_one(mask, weight, count, n, m, inner);
  if (inner > 1) return static_cast<Bits>(strided(mask, weight, count, n, m, inner));
  switch (m) {
    case 2:
      return static_cast<Bits>(neighbours<2>(mask, weight, count, n));
    case 4:
      return static_cast<Bits>(neighbours<4>(mask, weight, count, n));
    case 8:
      return static_cast<Bits>(neighbours<8>(mask, weight, count, n));
    default:
      return static_cast<Bits>(strided(mask, weight, count, n, m, inner));
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
