#include "csrc/ops/cpu/row_fit.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

#include "csrc/ops/formula/least_squares.h"

namespace cctorch::cpu {

namespace {

constexpr int kTurns = 20;
constexpr int kIterations = 50;
constexpr int64_t kMostBits = 8;

using Vector = std::array<double, kMostBits>;
using Matrix = std::array<Vector, kMostBits>;

double sign_in(size_t code, int64_t bit) { return (code >> bit & 1) != 0 ? 1.0 : -1.0; }

double level_of(size_t code, const std::vector<double>& scales) {
  double level = 0;
  for (size_t bit = 0; bit < scales.size(); ++bit) level += sign_in(code, static_cast<int64_t>(bit)) * scales[bit];
  return level;
}

void levels_of(const std::vector<double>& scales, std::vector<double>& levels) {
  levels.resize(size_t{1} << scales.size());
  for (size_t code = 0; code < levels.size(); ++code) levels[code] = level_of(code, scales);
  std::sort(levels.begin(), levels.end());
}

void midpoints(const std::vector<double>& levels, std::vector<double>& bounds) {
  bounds.resize(levels.size() - 1);
  for (size_t i = 0; i < bounds.size(); ++i) bounds[i] = (levels[i] + levels[i + 1]) / 2;
}

// How many of 2^k - 1 ascending bounds are below x.
size_t cell_of(double x, const std::vector<double>& bounds) {
  size_t cell = 0;
  for (size_t step = (bounds.size() + 1) / 2; step > 0; step /= 2) cell += x > bounds[cell + step - 1] ? step : 0;
  return cell;
}

}  // namespace

double RowFit::ternary_reach(const double* row, int64_t n) {
  return split_.ternary({row, n, simd::Storage::kDouble}).high;
}

void RowFit::binary_code(double* row, int64_t n, int64_t bits, std::optional<double> precision) {
  if (precision && is_code(row, n, bits, *precision)) return;
  if (bits <= 2) {
    const RowOf numbers{row, n, simd::Storage::kDouble};
    replace(numbers, row, bits == 1 ? scaled_signs(numbers) : split_.two_magnitudes(numbers));
    return;
  }
  sorted_.sort(row, n);
  fit_scales(row, n, bits);
  levels_of(scales_, levels_);
  replace_by_nearest(row, n);
}

void RowFit::greedy_code(double* row, int64_t n, int64_t bits) {
  left_.assign(row, row + n);
  std::fill_n(row, n, 0.0);
  for (int64_t bit = 0; bit < bits; ++bit) {
    const double mean = scaled_signs({left_.data(), n, simd::Storage::kDouble}).high;
    for (int64_t i = 0; i < n; ++i) {
      const double code = left_[i] < 0 ? -mean : mean;
      left_[i] -= code;
      row[i] += code;
    }
  }
}

// 1, 2 or 3 distinct magnitudes are one of 1, 2 or 3 codes; 4 are one of 3 codes if the smallest is |second + third -
// first|, as far as the type shows.
bool RowFit::is_code(const double* row, int64_t n, int64_t bits, double precision) {
  const int64_t most = bits < 3 ? bits : 4;
  std::array<double, 4> distinct{};
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double magnitude = std::abs(row[i]);
    if (std::find(distinct.begin(), distinct.begin() + count, magnitude) != distinct.begin() + count) continue;
    if (count == most) return false;
    distinct[count++] = magnitude;
  }
  if (count < 4) return true;
  std::sort(distinct.begin(), distinct.end(), std::greater<>());
  const double expected = std::abs(distinct[1] + distinct[2] - distinct[0]);
  return std::abs(expected - distinct[3]) <= 4 * precision * distinct[0];
}

// Of bits above 2: those of one bit less, the mean of what they leave, and alternating least squares.
void RowFit::fit_scales(const double* row, int64_t n, int64_t bits) {
  const auto [bound, high, low] = split_.two_magnitudes({row, n, simd::Storage::kDouble});
  scales_ = {(high + low) / 2, (high - low) / 2};
  for (int64_t count = 3; count <= bits; ++count) {
    scales_.push_back(mean_rest(row, n));
    alternate();
  }
}

double RowFit::mean_rest(const double* row, int64_t n) {
  levels_of(scales_, levels_);
  midpoints(levels_, bounds_);
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += std::abs(levels_[cell_of(row[i], bounds_)] - row[i]);
  return total / static_cast<double>(n);
}

// The codes by their levels, and where each one's cell ends in the sorted row.
void RowFit::cut() {
  cells_.resize(size_t{1} << scales_.size());
  levels_.resize(cells_.size());
  for (size_t code = 0; code < cells_.size(); ++code) {
    cells_[code].code = code;
    levels_[code] = level_of(code, scales_);
  }
  std::stable_sort(cells_.begin(), cells_.end(),
                   [&](const Cell& a, const Cell& b) { return levels_[a.code] < levels_[b.code]; });
  for (size_t i = 0; i + 1 < cells_.size(); ++i) {
    cells_[i].end = sorted_.up_to((levels_[cells_[i].code] + levels_[cells_[i + 1].code]) / 2);
  }
  cells_.back().end = sorted_.size();
}

// Between the nearest of the 2^bits levels and least squares for the scales, until nothing moves to another level.
void RowFit::alternate() {
  cells_.clear();
  for (int turn = 0; turn < kTurns; ++turn) {
    before_.swap(cells_);
    cut();
    if (cells_ == before_) return;
    const auto bits = static_cast<int64_t>(scales_.size());
    Matrix gram{};
    Vector moment{};
    int64_t begin = 0;
    for (const Cell& cell : cells_) {
      const double count = static_cast<double>(cell.end - begin), sum = sorted_.sum(begin, cell.end);
      for (int64_t p = 0; p < bits; ++p) {
        const double sign = sign_in(cell.code, p);
        moment[p] += sign * sum;
        for (int64_t q = 0; q < bits; ++q) gram[p][q] += sign * sign_in(cell.code, q) * count;
      }
      begin = cell.end;
    }
    Vector fitted;
    formula::least_squares(gram, moment, fitted, static_cast<int>(bits));
    std::copy_n(fitted.begin(), bits, scales_.begin());
  }
}

void RowFit::codebook(double* row, int64_t n, int64_t count) {
  sorted_.sort(row, n);
  int64_t distinct = 1;
  for (int64_t i = 1; i < n && distinct <= count; ++i) distinct += sorted_[i] != sorted_[i - 1] ? 1 : 0;
  if (distinct <= count) return;
  const auto fraction = [&](int64_t i) { return (static_cast<double>(i) + 0.5) / static_cast<double>(count); };
  levels_.resize(count);
  const double smallest = sorted_[0], largest = sorted_[n - 1];
  for (int64_t i = 0; i < count; ++i) levels_[i] = smallest + (largest - smallest) * fraction(i);
  const double even = lloyd();
  best_ = levels_;
  for (int64_t i = 0; i < count; ++i) levels_[i] = sorted_[static_cast<int64_t>(fraction(i) * static_cast<double>(n))];
  if (!(lloyd() > even)) levels_.swap(best_);
  replace_by_nearest(row, n);
}

// Moves the levels to the means of their cells, an empty cell's stays. Returns how far the squared error then is below
// ||row||^2.
double RowFit::lloyd() {
  double gain = 0;
  bool moved = true;
  for (int i = 0; i <= kIterations && moved; ++i) {
    midpoints(levels_, bounds_);
    gain = 0;
    moved = false;
    int64_t begin = 0;
    for (size_t cell = 0; cell < levels_.size(); ++cell) {
      const int64_t end = cell < bounds_.size() ? sorted_.up_to(bounds_[cell]) : sorted_.size();
      const double sum = sorted_.sum(begin, end), count = static_cast<double>(end - begin), level = levels_[cell];
      gain += 2 * level * sum - level * level * count;
      begin = end;
      if (i == kIterations || count == 0 || sum / count == level) continue;
      levels_[cell] = sum / count;
      moved = true;
    }
  }
  return gain;
}

void RowFit::replace_by_nearest(double* row, int64_t n) {
  midpoints(levels_, bounds_);
  for (int64_t i = 0; i < n; ++i) row[i] = levels_[cell_of(row[i], bounds_)];
}

}  // namespace cctorch::cpu
