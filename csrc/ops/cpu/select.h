#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

#include "csrc/ops/cpu/isa.h"
#include "csrc/ops/cpu/simd/mask.h"
#include "csrc/ops/formula/mask.h"

// The count-th largest magnitude over a list of tensors, exactly. A sample brackets it (Floyd and Rivest 1975); one
// pass over all weights, at the speed of reading them, counts what is on which side of the bracket and collects the few
// that are inside, and the search goes on among those. What the sample is decides how long that takes, not what comes
// out.
namespace cctorch::cpu::select {

// A part of a tensor and of what is made of it.
template <typename Bits>
struct Piece {
  const Bits* from;
  void* to;
  int64_t size;
};

template <typename Bits>
struct Selected {
  Bits threshold;  // the count-th largest magnitude
  int64_t wanted;  // how many of its equals are among the `count` largest
  Bits largest;
};

template <typename Bits>
simd::MaskLoops<Bits> loops() {
  return for_isa(&simd::baseline::mask_loops<Bits>, &simd::avx2::mask_loops<Bits>, &simd::avx512::mask_loops<Bits>)();
}

template <typename Bits>
void append(std::vector<Piece<Bits>>& pieces, const Bits* from, void* to, int64_t size, int64_t bytes_per_result) {
  constexpr int64_t kSize = simd::kMostMagnitudes;
  for (int64_t begin = 0; begin < size; begin += kSize) {
    void* part = to == nullptr ? nullptr : static_cast<char*>(to) + begin * bytes_per_result;
    pieces.push_back({from + begin, part, std::min(kSize, size - begin)});
  }
}

template <typename Bits>
int64_t total_size(const std::vector<Piece<Bits>>& pieces) {
  int64_t total = 0;
  for (const auto& piece : pieces) total += piece.size;
  return total;
}

// function(begin, end) over ranges of pieces, in one parallel region; a model's small tensors do not get a thread each.
template <typename Bits, typename Function>
void parallel(const std::vector<Piece<Bits>>& pieces, const Function& function) {
  const auto count = static_cast<int64_t>(pieces.size());
  const int64_t grain = count * 2 * simd::kMostMagnitudes / std::max<int64_t>(1, total_size(pieces));
  at::parallel_for(0, count, std::max<int64_t>(1, grain), function);
}

// Element i of the sample is in the i-th of `size` equal parts, at a place without a period.
inline int64_t sample_position(int64_t i, int64_t size, int64_t total) {
  const int64_t begin = i * total / size;
  const int64_t length = (i + 1) * total / size - begin;
  return begin + static_cast<int64_t>((static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15 >> 32) % length);
}

inline int64_t sample_size(int64_t total) { return std::llround(std::pow(static_cast<double>(total), 2.0 / 3)); }

template <typename Bits>
std::vector<Bits> sample(const std::vector<Piece<Bits>>& pieces, int64_t total) {
  std::vector<Bits> keys(sample_size(total));
  auto piece = pieces.begin();
  int64_t first = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    const int64_t position = sample_position(static_cast<int64_t>(i), static_cast<int64_t>(keys.size()), total);
    while (position >= first + piece->size) first += piece++->size;
    keys[i] = formula::magnitude(piece->from[position - first]);
  }
  return keys;
}

// Magnitudes that the one of rank `share` of all is between, most of the time.
template <typename Bits>
std::pair<Bits, Bits> bracket(std::vector<Bits> keys, double share) {
  constexpr double kDeviations = 3;
  const auto size = static_cast<double>(keys.size());
  const double margin = kDeviations * std::sqrt(size * share * (1 - share)) + 1;
  const double first = std::floor(share * size - margin);
  const double last = std::ceil(share * size + margin);
  Bits low = 0;
  auto end = keys.end();
  if (last < size) {
    end = keys.begin() + static_cast<int64_t>(last);
    std::nth_element(keys.begin(), end, keys.end(), std::greater<>());
    low = *end;
  }
  if (first < 0) return {low, formula::magnitude(static_cast<Bits>(~Bits(0)))};
  const auto begin = keys.begin() + static_cast<int64_t>(first);
  std::nth_element(keys.begin(), begin, end, std::greater<>());
  return {low, *begin};
}

template <typename Bits>
simd::Split<Bits> split(const std::vector<Piece<Bits>>& pieces, Bits low, Bits high, std::vector<Bits>& inside) {
  const auto run = loops<Bits>().split;
  simd::Split<Bits> all{};
  inside.clear();
  std::mutex mutex;
  parallel(pieces, [&](int64_t begin, int64_t end) {
    std::vector<Bits> found;
    simd::Split<Bits> part{};
    for (int64_t i = begin; i < end; ++i) {
      found.resize(part.inside + pieces[i].size);
      const auto one = run(pieces[i].from, pieces[i].size, low, high, found.data() + part.inside);
      part.above += one.above;
      part.at_high += one.at_high;
      part.inside += one.inside;
      part.at_low += one.at_low;
      part.largest = std::max(part.largest, one.largest);
    }
    const std::scoped_lock lock(mutex);
    inside.insert(inside.end(), found.begin(), found.begin() + part.inside);
    all = {all.above + part.above, all.at_high + part.at_high, all.inside + part.inside, all.at_low + part.at_low,
           std::max(all.largest, part.largest)};
  });
  return all;
}

template <typename Bits>
Selected<Bits> largest_of_few(const std::vector<Piece<Bits>>& pieces, int64_t count) {
  std::vector<Bits> keys;
  for (const auto& piece : pieces) keys.insert(keys.end(), piece.from, piece.from + piece.size);
  for (Bits& key : keys) key = formula::magnitude(key);
  const auto last = keys.begin() + (count - 1);
  std::nth_element(keys.begin(), last, keys.end(), std::greater<>());
  const Bits threshold = *last;
  const auto larger = std::count_if(keys.begin(), last, [&](Bits key) { return key > threshold; });
  return {threshold, count - larger, *std::max_element(keys.begin(), last + 1)};
}

// 1 <= count <= the number of elements.
template <typename Bits>
Selected<Bits> largest(const std::vector<Piece<Bits>>& pieces, int64_t count) {
  const int64_t total = total_size(pieces);
  if (total <= simd::kMostMagnitudes) return largest_of_few(pieces, count);
  auto [low, high] = bracket(sample(pieces, total), static_cast<double>(count) / static_cast<double>(total));
  std::vector<Bits> inside;
  auto found = split(pieces, low, high, inside);
  if (count <= found.above) {
    low = std::exchange(high, found.largest);
    found = split(pieces, low, high, inside);
  } else if (count > found.above + found.at_high + found.inside + found.at_low) {
    high = std::exchange(low, Bits(0));
    found = split(pieces, low, high, inside);
  }
  int64_t rank = count - found.above;
  if (rank <= found.at_high) return {high, rank, found.largest};
  rank -= found.at_high;
  if (rank > found.inside) return {low, rank - found.inside, found.largest};
  std::vector<Piece<Bits>> rest;
  append(rest, inside.data(), nullptr, found.inside, 0);
  const auto selected = largest(rest, rank);
  return {selected.threshold, selected.wanted, found.largest};
}

}  // namespace cctorch::cpu::select
