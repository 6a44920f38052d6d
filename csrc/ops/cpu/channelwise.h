#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
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
  int64_t grain() const { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, std::min(kBlock, layout.inner))); }
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

template <typename Formula, typename P = typename Formula::parameter_type>
void forward(const Formula& formula, const Layout& l, const at::Tensor& y, const at::Tensor& x, const P* parameters) {
  const auto run = loops<Formula>(x.scalar_type());
  const int64_t item = x.element_size();
  const simd::Stores stores = simd::stores_for(x.numel() * item);
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  if (has_long_rows(l)) {
    const Pieces pieces{l};
    at::parallel_for(0, pieces.count(), pieces.grain(), [&](int64_t begin, int64_t end) {
      const simd::Fence fence(stores);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t offset = pieces.begin(i) * item;
        run.forward(formula, to + offset, from + offset, pieces.size(i), parameters[pieces.channel(i)], stores);
      }
    });
    return;
  }
  const Period<typename Formula::value_type, P> period(l, parameters);
  at::parallel_for(0, period.count(), std::max<int64_t>(1, kGrain / period.size), [&](int64_t begin, int64_t end) {
    const simd::Fence fence(stores);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t offset = i * period.size * item;
      run.forward_each(formula, to + offset, from + offset, period.length(i), period.parameters(), stores);
    }
  });
}

template <typename Formula, typename P = typename Formula::parameter_type, typename T = typename Formula::value_type>
std::vector<formula::Wide<P>> backward_short_rows(const Formula& formula, const Layout& l, char* out, const char* grad,
                                                  const char* x, int64_t item, const simd::Loops<Formula>& run,
                                                  const P* parameters) {
  const Period<T, P> period(l, parameters);
  const simd::Stores stores = simd::stores_for(period.numel() * item);
  // Sums are kept in the formula's type over this many periods, then added up in double.
  constexpr int64_t kShortSum = 64;
  const int64_t per_block = std::max(ceil_div(kBlock, period.size), ceil_div(period.count(), 64));
  const int64_t blocks = ceil_div(period.count(), per_block);
  std::vector<formula::Wide<P>> sums(blocks * period.size);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const simd::Fence fence(stores);
    std::vector<T> short_sums(period.numbers.size());
    const formula::Columns<T, P> sums_of_elements{short_sums.data(), period.size};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min(period.count(), (block + 1) * per_block);
      auto* block_sums = sums.data() + block * period.size;
      for (int64_t first = block * per_block; first < last; first += kShortSum) {
        std::fill(short_sums.begin(), short_sums.end(), T(0));
        for (int64_t i = first; i < std::min(last, first + kShortSum); ++i) {
          const int64_t offset = i * period.size * item;
          run.backward_each(formula, out + offset, grad + offset, x + offset, period.length(i), period.parameters(),
                            sums_of_elements, stores);
        }
        for (int64_t j = 0; j < period.size; ++j) block_sums[j] += formula::wide(sums_of_elements[j]);
      }
    }
  });
  std::vector<formula::Wide<P>> totals(l.channels);
  for (int64_t i = 0; i < blocks * period.size; ++i) totals[i % period.size / l.inner % l.channels] += sums[i];
  return totals;
}

// Writes grad_x; returns the gradient of each channel's parameter. All tensors share one dense layout.
template <typename Formula, typename P = typename Formula::parameter_type>
std::vector<formula::Wide<P>> backward(const Formula& formula, const Layout& l, const at::Tensor& grad_x,
                                       const at::Tensor& grad, const at::Tensor& x, const P* parameters) {
  const auto run = loops<Formula>(x.scalar_type());
  const int64_t item = x.element_size();
  auto* out = static_cast<char*>(grad_x.mutable_data_ptr());
  const auto* gs = static_cast<const char*>(grad.const_data_ptr());
  const auto* xs = static_cast<const char*>(x.const_data_ptr());
  if (!has_long_rows(l)) return backward_short_rows(formula, l, out, gs, xs, item, run, parameters);

  const Pieces pieces{l};
  const simd::Stores stores = simd::stores_for(x.numel() * item);
  std::vector<formula::Wide<P>> sums(pieces.count());
  at::parallel_for(0, pieces.count(), pieces.grain(), [&](int64_t begin, int64_t end) {
    const simd::Fence fence(stores);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t offset = pieces.begin(i) * item;
      sums[i] = run.backward(formula, out + offset, gs + offset, xs + offset, pieces.size(i),
                             parameters[pieces.channel(i)], stores);
    }
  });
  std::vector<formula::Wide<P>> totals(l.channels);
  for (int64_t i = 0; i < pieces.count(); ++i) totals[pieces.channel(i)] += sums[i];
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
