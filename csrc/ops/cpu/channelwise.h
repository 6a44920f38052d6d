#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "csrc/ops/channelwise.h"
#include "csrc/ops/cpu/isa.h"
#include "csrc/ops/cpu/simd/loops.h"

// Element-wise formulas with one parameter per channel, over any dense layout. Sums are taken over blocks whose size
// depends on the shape alone and added in order, so results do not depend on the number of threads.
namespace cctorch::channelwise {

inline simd::Storage storage(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return simd::Storage::kDouble;
    case at::kHalf:
      return simd::Storage::kHalf;
    case at::kBFloat16:
      return simd::Storage::kBFloat16;
    default:
      return simd::Storage::kFloat;
  }
}

template <typename Formula>
simd::Loops<Formula> loops(at::ScalarType type) {
  return for_isa(&simd::baseline::loops<Formula>, &simd::avx2::loops<Formula>,
                 &simd::avx512::loops<Formula>)(storage(type));
}

constexpr int64_t kShortestRow = 64;
constexpr int64_t kBlock = 16384;
constexpr int64_t kGrain = 32768;

// Pieces of rows that share a parameter, for layouts with long rows.
struct Pieces {
  Layout layout;
  int64_t per_row = std::max<int64_t>(1, ceil_div(layout.inner, kBlock));

  int64_t count() const { return layout.outer * layout.channels * per_row; }
  int64_t channel(int64_t piece) const { return piece / per_row % layout.channels; }
  int64_t begin(int64_t piece) const { return piece / per_row * layout.inner + piece % per_row * kBlock; }
  int64_t size(int64_t piece) const { return std::min(kBlock, layout.inner - piece % per_row * kBlock); }
  int64_t length() const { return std::min(kBlock, layout.inner); }
};

// For layouts with short rows: the parameters written out for several rows, so that one call has a few hundred
// elements.
template <typename T, typename P>
struct Period {
  Layout layout;
  int64_t size;
  std::vector<T> numbers;

  Period(const Layout& l, const P* values) : layout(l), size(l.channels * l.inner) {
    size *= std::max<int64_t>(1, 512 / size);
    numbers.resize(size * formula::numbers_in<P>);
    const formula::Columns<T, P> columns{numbers.data(), size};
    for (int64_t i = 0; i < size; ++i) columns.add(i, values[i / l.inner % l.channels]);
  }
  formula::Columns<const T, P> parameters() const { return {numbers.data(), size}; }
  int64_t numel() const { return layout.outer * layout.channels * layout.inner; }
  int64_t count() const { return ceil_div(numel(), size); }
  int64_t length(int64_t index) const { return std::min(size, numel() - index * size); }
};

inline bool has_long_rows(const Layout& l) { return l.channels == 1 || l.inner >= kShortestRow; }

// One of a list of tensors, not empty. All of them share its dense layout; `parameters` has one for each channel.
template <typename P>
struct Operand {
  Layout layout;
  at::Tensor to;  // y, or the gradient of x
  at::Tensor x;
  std::vector<P> parameters;
  at::Tensor grad;  // of y, for the backward
};

// One tensor in units that any thread may take: pieces of its long rows, or periods of its short ones.
template <typename Formula>
struct Cut {
  using P = typename Formula::parameter_type;

  const Formula& formula;
  simd::Stores stores;
  const Operand<P>& operand;
  simd::Loops<Formula> run;
  Pieces pieces;
  std::optional<Period<typename Formula::value_type, P>> period;

  Cut(const Formula& formula, simd::Stores stores, const Operand<P>& operand)
      : formula(formula),
        stores(stores),
        operand(operand),
        run(loops<Formula>(operand.x.scalar_type())),
        pieces{operand.layout} {
    if (!has_long_rows(operand.layout)) period.emplace(operand.layout, operand.parameters.data());
  }
};

// y = formula(x) of one tensor.
template <typename Formula>
class Forward {
  using P = typename Formula::parameter_type;

 public:
  Forward(const Formula& formula, simd::Stores stores, const Operand<P>& operand) : cut_(formula, stores, operand) {}

  int64_t units() const { return cut_.period ? cut_.period->count() : cut_.pieces.count(); }
  int64_t unit_size() const { return cut_.period ? cut_.period->size : cut_.pieces.length(); }

  void operator()(int64_t unit) const {
    const int64_t begin =
        (cut_.period ? unit * cut_.period->size : cut_.pieces.begin(unit)) * cut_.operand.x.element_size();
    auto* to = static_cast<char*>(cut_.operand.to.mutable_data_ptr()) + begin;
    const auto* from = static_cast<const char*>(cut_.operand.x.const_data_ptr()) + begin;
    if (cut_.period) {
      cut_.run.forward_each(cut_.formula, to, from, cut_.period->length(unit), cut_.period->parameters(), cut_.stores);
    } else {
      cut_.run.forward(cut_.formula, to, from, cut_.pieces.size(unit),
                       cut_.operand.parameters[cut_.pieces.channel(unit)], cut_.stores);
    }
  }

 private:
  Cut<Formula> cut_;
};

// The gradient of x of one tensor, and those of its parameters, in the same way: pieces leave a sum each, and where
// rows are short, blocks of periods leave one for each of a period's elements.
template <typename Formula>
class Backward {
  using T = typename Formula::value_type;
  using P = typename Formula::parameter_type;

 public:
  Backward(const Formula& formula, simd::Stores stores, const Operand<P>& operand) : cut_(formula, stores, operand) {
    if (cut_.period) {
      per_block_ = std::max(ceil_div(kBlock, cut_.period->size), ceil_div(cut_.period->count(), 64));
    }
    sums_.resize(units() * (cut_.period ? cut_.period->size : 1));
  }

  int64_t units() const { return cut_.period ? ceil_div(cut_.period->count(), per_block_) : cut_.pieces.count(); }
  int64_t unit_size() const { return cut_.period ? per_block_ * cut_.period->size : cut_.pieces.length(); }

  void operator()(int64_t unit) {
    if (cut_.period) {
      block(unit, *cut_.period);
    } else {
      const int64_t begin = cut_.pieces.begin(unit) * cut_.operand.x.element_size();
      sums_[unit] = cut_.run.backward(cut_.formula, to() + begin, grad() + begin, x() + begin, cut_.pieces.size(unit),
                                      cut_.operand.parameters[cut_.pieces.channel(unit)], cut_.stores);
    }
  }

  // For each channel, once all units are done.
  std::vector<formula::Wide<P>> totals() const {
    const Layout& l = cut_.operand.layout;
    std::vector<formula::Wide<P>> totals(l.channels);
    for (size_t i = 0; i < sums_.size(); ++i) {
      const auto at = static_cast<int64_t>(i);
      totals[cut_.period ? at % cut_.period->size / l.inner % l.channels : cut_.pieces.channel(at)] += sums_[i];
    }
    return totals;
  }

 private:
  char* to() const { return static_cast<char*>(cut_.operand.to.mutable_data_ptr()); }
  const char* grad() const { return static_cast<const char*>(cut_.operand.grad.const_data_ptr()); }
  const char* x() const { return static_cast<const char*>(cut_.operand.x.const_data_ptr()); }

  void block(int64_t unit, const Period<T, P>& period) {
    // Sums are kept in the formula's type over this many periods, then added up in double.
    constexpr int64_t kShortSum = 64;
    std::vector<T> short_sums(period.numbers.size());
    const formula::Columns<T, P> sums_of_elements{short_sums.data(), period.size};
    const int64_t last = std::min(period.count(), (unit + 1) * per_block_);
    auto* block_sums = sums_.data() + unit * period.size;
    for (int64_t first = unit * per_block_; first < last; first += kShortSum) {
      std::fill(short_sums.begin(), short_sums.end(), T(0));
      for (int64_t i = first; i < std::min(last, first + kShortSum); ++i) {
        const int64_t begin = i * period.size * cut_.operand.x.element_size();
        cut_.run.backward_each(cut_.formula, to() + begin, grad() + begin, x() + begin, period.length(i),
                               period.parameters(), sums_of_elements, cut_.stores);
      }
      for (int64_t j = 0; j < period.size; ++j) block_sums[j] += formula::wide(sums_of_elements[j]);
    }
  }

  Cut<Formula> cut_;
  int64_t per_block_ = 0;
  std::vector<formula::Wide<P>> sums_;
};

// Forward or Backward of every operand, once all of them are finished: one parallel region, in parts of about as many
// elements.
template <template <typename> typename Work, typename Formula, typename P = typename Formula::parameter_type>
std::vector<Work<Formula>> done(const Formula& formula, const std::vector<Operand<P>>& operands) {
  struct Part {
    Work<Formula>* work;
    int64_t begin, end;
  };
  int64_t bytes = 0;
  for (const auto& operand : operands) bytes += operand.x.numel() * operand.x.element_size();
  const simd::Stores stores = simd::stores_for(bytes);
  std::vector<Work<Formula>> works;
  works.reserve(operands.size());
  std::vector<Part> parts;
  for (const auto& operand : operands) {
    auto& work = works.emplace_back(formula, stores, operand);
    const int64_t step = std::max<int64_t>(1, kGrain / work.unit_size());
    for (int64_t begin = 0; begin < work.units(); begin += step) {
      parts.push_back({&work, begin, std::min(begin + step, work.units())});
    }
  }
  at::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t first, int64_t last) {
    const simd::Fence fence(stores);
    for (int64_t i = first; i < last; ++i) {
      for (int64_t unit = parts[i].begin; unit < parts[i].end; ++unit) (*parts[i].work)(unit);
    }
  });
  return works;
}

template <typename Formula, typename P = typename Formula::parameter_type>
void forward(const Formula& formula, const std::vector<Operand<P>>& operands) {
  done<Forward>(formula, operands);
}

// Writes the gradients of x; returns those of each operand's parameters.
template <typename Formula, typename P = typename Formula::parameter_type>
std::vector<std::vector<formula::Wide<P>>> backward(const Formula& formula, const std::vector<Operand<P>>& operands) {
  std::vector<std::vector<formula::Wide<P>>> totals;
  for (const auto& work : done<Backward>(formula, operands)) totals.push_back(work.totals());
  return totals;
}

// value(channel) times `factor` for each element of `to`, which is contiguous.
template <typename Value>
void store(const Value& value, const at::Tensor& to, double factor = 1.0) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, to.scalar_type(), "store", [&] {
    auto* out = to.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < to.numel(); ++i) out[i] = static_cast<scalar_t>(factor * value(i));
  });
}

}  // namespace cctorch::channelwise
