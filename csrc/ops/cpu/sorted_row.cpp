#include "csrc/ops/cpu/sorted_row.h"

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

namespace cctorch::cpu {

namespace {

constexpr uint64_t kSign = uint64_t{1} << 63;
constexpr uint64_t kValues = 256;
constexpr int64_t kShort = 160;  // up to here comparisons are faster than counting digits

// As unsigned integers these are in the order of the numbers; NaN comes last, or with its sign set first.
uint64_t key_of(double value) {
  const auto bits = std::bit_cast<uint64_t>(value);
  return bits ^ ((bits & kSign) != 0 ? ~uint64_t{0} : kSign);
}

double value_of(uint64_t key) { return std::bit_cast<double>(key ^ ((key & kSign) != 0 ? kSign : ~uint64_t{0})); }

}  // namespace

// Digit by digit, the lowest first, of those bits in which keys differ: 32 at most where they were float32.
void SortedRow::sort_keys() {
  const auto n = static_cast<int64_t>(keys_.size());
  if (n <= kShort) {
    std::sort(keys_.begin(), keys_.end());
    return;
  }
  uint64_t different = 0;
  for (const uint64_t key : keys_) different |= key ^ keys_[0];
  if (different == 0) return;
  const int lowest = std::countr_zero(different),
            places = (static_cast<int>(std::bit_width(different)) - lowest + 7) / 8;
  const auto digit = [&](uint64_t key, int place) { return key >> (lowest + 8 * place) & (kValues - 1); };
  std::array<std::array<int64_t, kValues>, 8> counts;
  std::fill_n(counts.begin(), places, std::array<int64_t, kValues>{});
  for (const uint64_t key : keys_) {
    for (int place = 0; place < places; ++place) ++counts[place][digit(key, place)];
  }
  spare_.resize(n);
  for (int place = 0; place < places; ++place) {
    int64_t begin = 0;
    for (int64_t& position : counts[place]) begin += std::exchange(position, begin);
    for (const uint64_t key : keys_) spare_[counts[place][digit(key, place)]++] = key;
    keys_.swap(spare_);
  }
}

void SortedRow::sort(const double* row, int64_t n) {
  keys_.resize(n);
  for (int64_t i = 0; i < n; ++i) keys_[i] = key_of(row[i]);
  sort_keys();
  add_up();
}

void SortedRow::add_up() {
  const size_t n = keys_.size();
  values_.resize(n);
  sums_.resize(n + 1);
  double total = 0;
  for (size_t i = 0; i < n; ++i) {
    values_[i] = value_of(keys_[i]);
    total += values_[i];
    sums_[i + 1] = total;
  }
}

}  // namespace cctorch::cpu
