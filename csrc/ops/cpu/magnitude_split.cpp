#include "csrc/ops/cpu/magnitude_split.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "csrc/ops/cpu/isa.h"
#include "csrc/ops/cpu/row_blocks.h"

namespace cctorch::cpu {

namespace {

using simd::Tail;

// First thresholds, as multiples of the mean: closest together where the optimum of a normal distribution is.
constexpr std::array kOfTernary{0.3, 0.55, 0.66, 0.75, 0.86, 1.0, 1.3, 2.0};
constexpr std::array kOfTwoMagnitudes{0.5, 0.85, 1.05, 1.17, 1.29, 1.45, 1.7, 2.3};

// Vectors of what is not inside are written behind it.
constexpr int64_t kRoom = 16;

simd::MagnitudeLoops loops(simd::Storage storage) {
  return for_isa(&simd::baseline::magnitude_loops, &simd::avx2::magnitude_loops,
                 &simd::avx512::magnitude_loops)(storage);
}

int64_t bytes_of(simd::Storage storage) {
  switch (storage) {
    case simd::Storage::kDouble:
      return 8;
    case simd::Storage::kFloat:
      return 4;
    default:
      return 2;
  }
}

const void* at(const RowOf& row, int64_t i) { return static_cast<const char*>(row.data) + i * bytes_of(row.storage); }

// The same as the type of the row's arithmetic has it: rounded for all but float64.
double as_in(const RowOf& row, double value) {
  return row.storage == simd::Storage::kDouble ? value : static_cast<double>(static_cast<float>(value));
}

// Of the k largest the sum is S.
struct TernaryGain {
  double operator()(const Tail& above) const { return above.sum * above.sum / above.count; }
};

struct TwoMagnitudesGain {
  double count, sum;  // of all

  double operator()(const Tail& above) const {
    const double rest = sum - above.sum, others = count - above.count;
    return above.sum * above.sum / above.count + (others > 0 ? rest * rest / others : 0);
  }
};

// Of a row of zeros, or of one with NaN or infinity.
SignedLevels none_of(double sum) {
  const double level = std::isfinite(sum) ? 0 : std::numeric_limits<double>::quiet_NaN();
  return {0, level, level};
}

Tail plus(const Tail& a, const Tail& b) { return {a.count + b.count, a.sum + b.sum}; }

simd::Magnitudes summary(const RowOf& row) {
  const auto run = loops(row.storage).summary;
  if (row.size <= kRowBlock) return run(row.data, row.size);
  std::vector<simd::Magnitudes> parts(row_blocks(row.size));
  for_each_block(row.size,
                 [&](int64_t block, int64_t begin, int64_t size) { parts[block] = run(at(row, begin), size); });
  simd::Magnitudes all{0, 0};
  for (const auto& part : parts) all = {all.sum + part.sum, std::max(all.largest, part.largest)};
  return all;
}

std::array<Tail, simd::kTails> tails_of(const RowOf& row, const std::array<double, simd::kTails>& thresholds) {
  const auto run = loops(row.storage).tails;
  std::array<Tail, simd::kTails> tails{};
  if (row.size <= kRowBlock) {
    run(row.data, row.size, thresholds.data(), tails.data());
    return tails;
  }
  std::vector<std::array<Tail, simd::kTails>> parts(row_blocks(row.size));
  for_each_block(row.size, [&](int64_t block, int64_t begin, int64_t size) {
    run(at(row, begin), size, thresholds.data(), parts[block].data());
  });
  for (const auto& part : parts) {
    for (size_t i = 0; i < tails.size(); ++i) tails[i] = plus(tails[i], part[i]);
  }
  return tails;
}

}  // namespace

SignedLevels scaled_signs(const RowOf& row) {
  const double mean = summary(row).sum / static_cast<double>(row.size);
  return {0, mean, mean};
}

void replace(const RowOf& row, void* to, const SignedLevels& levels, simd::Stores stores) {
  loops(row.storage).replace(to, row.data, row.size, levels.bound, levels.high, levels.low, stores);
}

// Where the lines through the tails at both thresholds meet, which have these as slopes.
simd::Tail MagnitudeSplit::crossing(const Edge& low, const Edge& high) {
  const double from_low = low.above.sum - low.above.count * low.at;
  const double from_high = high.above.sum - high.above.count * high.at;
  const double count = std::clamp((from_low - from_high) / (high.at - low.at), high.above.count, low.above.count);
  return {count, from_high + count * high.at};
}

SignedLevels MagnitudeSplit::ternary(const RowOf& row) {
  const auto all = summary(row);
  if (!std::isfinite(all.sum) || all.sum == 0) return none_of(all.sum);
  const auto found = best(row, all, kOfTernary, TernaryGain{});
  const double reach = found.above.sum / found.above.count;
  return {reach / 2, reach, 0};
}

SignedLevels MagnitudeSplit::two_magnitudes(const RowOf& row) {
  const auto all = summary(row);
  if (!std::isfinite(all.sum) || all.sum == 0) return none_of(all.sum);
  const auto n = static_cast<double>(row.size);
  const auto found = best(row, all, kOfTwoMagnitudes, TwoMagnitudesGain{n, all.sum});
  const double high = found.above.sum / found.above.count, low = found.below / std::max(n - found.above.count, 1.0);
  return {(low + high) / 2, high, low};
}

template <typename Gain>
MagnitudeSplit::Split MagnitudeSplit::best(const RowOf& row, const simd::Magnitudes& all, const Ratios& to_mean,
                                           const Gain& gain) {
  constexpr double kRoundingOfFloat = 1e-4, kRoundingOfDouble = 0x1p-53;
  const auto n = static_cast<double>(row.size);
  simd::Outside outside{};
  if (row.size <= simd::kMostRanks) {
    cut(row, -1, all.largest, outside);
    return best_inside(outside, gain);
  }
  const double margin = std::max(1e-12, n * kRoundingOfDouble);
  Ratios first;
  for (int i = 0; i < simd::kTails; ++i) first[i] = as_in(row, std::min(to_mean[i] * all.sum / n, all.largest));
  Interval interval = narrowed(row, {{0, {n, all.sum}}, {all.largest, {0, 0}}}, first,
                               row.storage == simd::Storage::kDouble ? margin : kRoundingOfFloat, gain);
  cut(row, interval.low.at, interval.high.at, outside);
  for (int64_t before = row.size; found_ > simd::kMostRanks;) {
    if (found_ > before - before / 4) return best_sorted(outside, gain);
    before = found_;
    const RowOf rest{inside_.data(), found_, simd::Storage::kDouble};
    interval.high.above = outside.above;
    interval.low.above = plus(outside.above, {static_cast<double>(found_), summary(rest).sum});
    const double low = interval.low.at, width = interval.high.at - low;
    Ratios thresholds;
    for (int i = 0; i < simd::kTails; ++i) thresholds[i] = low + width * (i + 1) / (simd::kTails + 1);
    interval = narrowed(rest, interval, thresholds, margin, gain);
    cut(rest, interval.low.at, interval.high.at, outside);
  }
  return best_inside(outside, gain);
}

// From the lowest to the highest of the thresholds, and of the intervals between them, where the gain may be largest:
// low and high are one where that is at a threshold.
template <typename Gain>
MagnitudeSplit::Interval MagnitudeSplit::narrowed(const RowOf& row, const Interval& interval, const Ratios& thresholds,
                                                  double margin, const Gain& gain) const {
  const auto tails = tails_of(row, thresholds);
  std::array<Edge, simd::kTails + 2> edges;
  edges.front() = interval.low;
  edges.back() = interval.high;
  for (int i = 0; i < simd::kTails; ++i) {
    edges[i + 1] = {thresholds[i], plus(interval.high.above, tails[i])};
  }
  double most = 0;
  for (const Edge& edge : edges) most = edge.above.count > 0 ? std::max(most, gain(edge.above)) : most;
  const double least = most * (1 - margin);
  size_t first = edges.size(), last = 0;
  const auto keep = [&](size_t from, size_t to) {
    first = std::min(first, from);
    last = std::max(last, to);
  };
  for (size_t i = 0; i < edges.size(); ++i) {
    const Tail& above = edges[i].above;
    if (above.count > 0 && !(gain(above) < least)) keep(i, i);
    if (i + 1 == edges.size() || above.count == edges[i + 1].above.count) continue;
    if (!(gain(crossing(edges[i], edges[i + 1])) < least)) keep(i, i + 1);
  }
  return {edges[first], edges[last]};
}

// Moves what is in (low, high] to inside_; `row` may be there already.
void MagnitudeSplit::cut(const RowOf& row, double low, double high, simd::Outside& outside) {
  const auto run = loops(row.storage).cut;
  if (row.size <= kRowBlock) {
    if (row.data != inside_.data() && inside_.size() < static_cast<size_t>(row.size + kRoom)) {
      inside_.resize(row.size + kRoom);
    }
    found_ = run(row.data, row.size, low, high, outside, inside_.data());
    return;
  }
  std::vector<simd::Outside> outsides(row_blocks(row.size));
  std::vector<int64_t> counts(outsides.size());
  parts_.resize(std::max(parts_.size(), outsides.size()));
  for_each_block(row.size, [&](int64_t block, int64_t begin, int64_t size) {
    parts_[block].resize(kRowBlock + kRoom);
    counts[block] = run(at(row, begin), size, low, high, outsides[block], parts_[block].data());
  });
  found_ = 0;
  inside_.resize(std::max<size_t>(inside_.size(), std::accumulate(counts.begin(), counts.end(), kRoom)));
  for (size_t i = 0; i < outsides.size(); ++i) {
    outside.above = plus(outside.above, outsides[i].above);
    outside.below += outsides[i].below;
    std::copy_n(parts_[i].begin(), counts[i], inside_.begin() + found_);
    found_ += counts[i];
  }
}

// Of a few: each of them is a threshold.
template <typename Gain>
MagnitudeSplit::Split MagnitudeSplit::best_inside(const simd::Outside& outside, const Gain& gain) {
  std::array<Tail, simd::kMostRanks> tails;
  for_isa(&simd::baseline::ranks, &simd::avx2::ranks, &simd::avx512::ranks)(inside_.data(), found_, tails.data());
  double sum = 0;
  for (int64_t i = 0; i < found_; ++i) sum += inside_[i];
  Tail chosen = plus(outside.above, {static_cast<double>(found_), sum});
  double most = gain(chosen), threshold = -1;  // of which all are above
  const auto compare = [&](const Tail& above, double at) {
    const double gained = gain(above);
    if (above.count == 0 || gained < most || (gained == most && above.count >= chosen.count)) return;
    chosen = above;
    most = gained;
    threshold = at;
  };
  for (int64_t i = 0; i < found_; ++i) compare(plus(outside.above, tails[i]), inside_[i]);
  if (found_ == 0) threshold = 0;
  double below = outside.below;
  for (int64_t i = 0; i < found_; ++i) below += inside_[i] <= threshold ? inside_[i] : 0;
  return {chosen, below};
}

// Of many that thresholds do not tell apart, as equal ones.
template <typename Gain>
MagnitudeSplit::Split MagnitudeSplit::best_sorted(const simd::Outside& outside, const Gain& gain) {
  sorted_.sort(inside_.data(), found_);
  Split chosen{outside.above, outside.below + sorted_.sum(0, found_)};
  double most = outside.above.count > 0 ? gain(outside.above) : -1;
  for (int64_t k = 1; k <= found_; ++k) {
    const Tail above = plus(outside.above, {static_cast<double>(k), sorted_.sum(found_ - k, found_)});
    if (!(gain(above) > most)) continue;
    most = gain(above);
    chosen = {above, outside.below + sorted_.sum(0, found_ - k)};
  }
  return chosen;
}

}  // namespace cctorch::cpu
