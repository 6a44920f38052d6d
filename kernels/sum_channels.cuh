#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels/block.cuh"
#include "kernels/list.cuh"
#include "kernels/parameters.cuh"
#include "kernels/vector.cuh"

// The backward of an element-wise formula with one parameter per channel: the gradient of x, and that of the parameters
// as a sum in two stages. Blocks add up the contributions while they are made; then one block for each channel adds up
// what those blocks found. The order is that of the layout and the number of blocks, so sums do not vary.
namespace cctorch::cuda::sum_channels {

// What a warp takes of a row at once.
constexpr int64_t kSegment = 2048;

template <typename S, typename Formula, typename Source>
struct Arguments {
  using T = typename Formula::value_type;
  using P = typename Formula::parameter_type;

  Formula formula;
  Source source;
  Layout layout;
  S* grad_x;
  const S* grad;
  const S* x;
  int64_t numel;

  // The gradient of one element of x; adds the contribution to that of the parameter.
  __device__ S backward(S grad_of_y, S value, const P& parameter, P& sum) const {
    const auto gradients = formula.backward(static_cast<T>(grad_of_y), static_cast<T>(value), parameter);
    sum += gradients.parameter;
    return static_cast<S>(gradients.x);
  }

  __device__ void element(int64_t i, const P& parameter, P& sum) const {
    grad_x[i] = backward(grad[i], x[i], parameter, sum);
  }

  // `count` vectors from i on, `step` elements apart; all of them are loaded before the first is stored.
  template <int count>
  __device__ void vectors(int64_t i, int64_t step, const P (&parameters)[kVector<S>], P (&sums)[kVector<S>]) const {
    Pack<S, kVector<S>> grads[count], values[count];
    CCTORCH_UNROLL
    for (int k = 0; k < count; ++k) {
      grads[k] = load<kVector<S>>(grad + i + k * step);
      values[k] = load<kVector<S>>(x + i + k * step);
    }
    CCTORCH_UNROLL
    for (int k = 0; k < count; ++k) {
      CCTORCH_UNROLL
      for (int j = 0; j < kVector<S>; ++j) {
        grads[k].values[j] = backward(grads[k].values[j], values[k].values[j], parameters[j], sums[j]);
      }
      store(grad_x + i + k * step, grads[k]);
    }
  }

  // All vectors from i on, `step` apart, that begin before `end`.
  __device__ void vectors_until(int64_t i, int64_t end, int64_t step, const P (&parameters)[kVector<S>],
                                P (&sums)[kVector<S>]) const {
    // The elements of more would not fit into registers.
    constexpr int kInFlight = kVector<S> == 8 ? 1 : 2;
    CCTORCH_KEEP_LOOP
    for (; i + (kInFlight - 1) * step < end; i += kInFlight * step) vectors<kInFlight>(i, step, parameters, sums);
    CCTORCH_KEEP_LOOP
    for (; i < end; i += step) vectors<1>(i, step, parameters, sums);
  }
};

// `splits` blocks for each channel; every warp takes segments of its rows. For layouts with long rows. Where a channel
// is no more than a segment, a group of weights for example, each warp takes one and leaves nothing to put together.
template <typename S, typename Formula, typename Source>
struct BackwardRows {
  using T = typename Formula::value_type;
  using P = typename Formula::parameter_type;
  struct Shared {
    T warp_sums[kWarps];
  };

  Arguments<S, Formula, Source> arguments;
  bool aligned;
  int64_t splits;  // 0: a warp for each channel
  P* partials;     // channels x splits
  double factor;   // these two for the warps
  Totals<T, P> sums_of_channels;

  int64_t blocks() const {
    return splits == 0 ? ceil_div(arguments.layout.channels, int64_t(kWarps)) : arguments.layout.channels * splits;
  }

  __device__ void operator()(Shared& shared, int64_t block = blockIdx.x) const {
    const Layout& l = arguments.layout;
    const int64_t channel = splits == 0 ? block * kWarps + threadIdx.x / kWarp : block / splits;
    if (channel >= l.channels) return;  // a whole warp, of those that need no others
    const P parameter = arguments.source(arguments.formula, channel);
    P parameters[kVector<S>];
    P sums[kVector<S>]{};
    CCTORCH_UNROLL
    for (int j = 0; j < kVector<S>; ++j) parameters[j] = parameter;
    if (splits == 0) {
      add(channel * l.inner, (channel + 1) * l.inner, parameters, sums);
      const auto total = warp_sum(formula::wide(sum_of(sums)));
      if (threadIdx.x % kWarp == 0) sums_of_channels.set(channel, formula::Narrow<P>::from(total * factor));
      return;
    }
    const int64_t per_row = ceil_div(l.inner, kSegment);
    CCTORCH_KEEP_LOOP
    for (int64_t segment = block % splits * kWarps + threadIdx.x / kWarp; segment < l.outer * per_row;
         segment += splits * kWarps) {
      const int64_t outer = per_row == 1 ? segment : segment / per_row;  // spares short rows the division
      const int64_t row = (outer * l.channels + channel) * l.inner;
      const int64_t begin = (segment - outer * per_row) * kSegment;
      add(row + begin, row + std::min(begin + kSegment, l.inner), parameters, sums);
    }
    const P total = block_sum(sum_of(sums), shared.warp_sums);
    if (threadIdx.x == 0) partials[block] = total;
  }

  __device__ static P sum_of(const P (&sums)[kVector<S>]) {
    P sum{};
    CCTORCH_UNROLL
    for (int j = 0; j < kVector<S>; ++j) sum += sums[j];
    return sum;
  }

  // Vectors, and one by one what comes before the first and after the last of them.
  __device__ void add(int64_t begin, int64_t end, const P (&parameters)[kVector<S>], P (&sums)[kVector<S>]) const {
    const unsigned lane = threadIdx.x % kWarp;
    const int64_t first = aligned ? std::min(end, ceil_div(begin, kVector<S>) * kVector<S>) : end;
    const int64_t last = end - (end - first) % kVector<S>;
    arguments.vectors_until(first + lane * kVector<S>, last, kWarp * kVector<S>, parameters, sums);
    CCTORCH_KEEP_LOOP
    for (int64_t i = lane; i < first - begin + end - last; i += kWarp) {
      arguments.element(i < first - begin ? begin + i : i - (first - begin) + last, parameters[0], sums[0]);
    }
  }
};

// Each thread adds up the columns of a vector, of rows that are several of outer: as many as make a row a number of
// whole vectors, and enough for a warp. `splits` blocks for every tile of a warp's columns. For layouts with short
// rows.
template <typename S, typename Formula, typename Source>
struct BackwardColumns {
  using P = typename Formula::parameter_type;
  struct Shared {
    P sums[kWarps][kVector<S>][kWarp];
  };
  static constexpr int kTile = kWarp * kVector<S>;

  Arguments<S, Formula, Source> arguments;
  bool aligned;
  int64_t splits;
  int64_t columns;
  P* partials;  // splits x columns

  int64_t blocks() const { return ceil_div(columns, kTile) * splits; }

  __device__ void operator()(Shared& shared, int64_t block = blockIdx.x) const {
    const int64_t split = block % splits;
    const unsigned warp = threadIdx.x / kWarp;
    const unsigned lane = threadIdx.x % kWarp;
    const int64_t column = block / splits * kTile + lane * kVector<S>;
    P sums[kVector<S>]{};
    if (column < columns) add(column, split * kWarps + warp, sums);
    CCTORCH_UNROLL
    for (int j = 0; j < kVector<S>; ++j) shared.sums[warp][j][lane] = sums[j];
    __syncthreads();
    if (warp > 0 || column >= columns) return;
    CCTORCH_UNROLL
    for (int j = 0; j < kVector<S>; ++j) {
      for (unsigned other = 1; other < kWarps; ++other) sums[j] += shared.sums[other][j][lane];
      partials[split * columns + column + j] = sums[j];
    }
  }

  __device__ void add(int64_t column, int64_t row, P (&sums)[kVector<S>]) const {
    P parameters[kVector<S>];
    CCTORCH_UNROLL
    for (int j = 0; j < kVector<S>; ++j) {
      const int64_t channel = (column + j) / arguments.layout.inner % arguments.layout.channels;
      parameters[j] = arguments.source(arguments.formula, channel);
    }
    const int64_t step = splits * kWarps * columns;
    int64_t i = row * columns + column;
    if (aligned) {
      const int64_t whole = arguments.numel / kVector<S> * kVector<S>;
      arguments.vectors_until(i, whole, step, parameters, sums);
      if (i < whole) i += ceil_div(whole - i, step) * step;
    }
    CCTORCH_KEEP_LOOP
    for (; i < arguments.numel; i += step) {
      CCTORCH_UNROLL
      for (int j = 0; j < kVector<S>; ++j) {
        if (i + j < arguments.numel) arguments.element(i + j, parameters[j], sums[j]);
      }
    }
  }
};

// One block for each channel: factor times the sum of its partials, which are outer x channels x inner.
template <typename T, typename P>
struct SumPartials {
  struct Shared {
    double warp_sums[kWarps];
  };

  Layout layout;
  const P* partials;
  double factor;
  Totals<T, P> sums;

  int64_t blocks() const { return layout.channels; }

  __device__ void operator()(Shared& shared, int64_t channel = blockIdx.x) const {
    formula::Wide<P> sum{};
    for (int64_t i = threadIdx.x; i < layout.outer * layout.inner; i += kThreads) {
      const int64_t row = i / layout.inner * layout.channels + channel;
      sum += formula::wide(partials[row * layout.inner + i % layout.inner]);
    }
    const auto total = block_sum(sum, shared.warp_sums);
    if (threadIdx.x == 0) sums.set(channel, formula::Narrow<P>::from(total * factor));
  }
};

// How many blocks share a channel or a tile of columns, and the layout of what they find: nothing with no splits.
struct Partition {
  bool rows;
  int64_t splits;
  Layout partials;

  int64_t numel() const { return partials.outer * partials.channels * partials.inner; }
};

// About `most_blocks` blocks, a few times as many of rows, but no more than have work.
template <typename S>
Partition partition(const Layout& l, int64_t most_blocks) {
  constexpr int64_t kTile = kWarp * kVector<S>;
  const auto splits = [](int64_t groups, int64_t warps, int64_t blocks) {
    return std::min(ceil_div(warps, kWarps), std::max<int64_t>(1, blocks / groups));
  };
  if (l.outer == 1 && l.inner <= kSegment) return {true, 0, {0, l.channels, 0}};
  // Columns of few rows would leave as many partials as there are elements.
  if (l.channels == 1 || l.inner >= (l.outer < kWarp ? kWarp : kTile)) {
    // The last blocks run with few others: of more, they are a smaller part, and a block leaves one number.
    const int64_t parts = splits(l.channels, l.outer * ceil_div(l.inner, kSegment), 4 * most_blocks);
    return {true, parts, {1, l.channels, parts}};
  }
  const int64_t period = l.channels * l.inner;
  const int64_t whole = kVector<S> / std::gcd(period, int64_t(kVector<S>));
  const int64_t repeats = whole * std::max<int64_t>(1, kTile / (whole * period));
  const int64_t tiles = ceil_div(repeats * period, kTile);
  const int64_t parts = splits(tiles, ceil_div(l.outer, repeats), most_blocks);
  return {false, parts, {parts * repeats, l.channels, l.inner}};
}

// Writes the grad_x of each, and to its `sums` the gradients of the channels' parameters times factor.
template <typename S, typename Formula, typename Source>
struct Work {
  using T = typename Formula::value_type;
  using P = typename Formula::parameter_type;

  Arguments<S, Formula, Source> arguments;
  Partition part;
  P* partials;  // room for part.numel()
  double factor;
  Totals<T, P> sums;

  bool aligned() const { return are_aligned<kVector<S>>(arguments.grad_x, arguments.grad, arguments.x); }
  BackwardRows<S, Formula, Source> rows() const { return {arguments, aligned(), part.splits, partials, factor, sums}; }
  BackwardColumns<S, Formula, Source> columns() const {
    const Layout& found = part.partials;
    return {arguments, aligned(), part.splits, found.outer / part.splits * found.channels * found.inner, partials};
  }
  SumPartials<T, P> sum() const { return {part.partials, partials, factor, sums}; }
};

// launch(blocks, kernel) starts a kernel after the ones before.
template <typename Launch, typename S, typename Formula, typename Source>
void backward(const Launch& launch, const Work<S, Formula, Source>& work) {
  const auto start = [&](const auto& kernel) { launch(kernel.blocks(), kernel); };
  work.part.rows ? start(work.rows()) : start(work.columns());
  if (work.part.splits > 0) start(work.sum());
}

// All of a list in a few launches.
template <typename Launch, typename S, typename Formula, typename Source>
void backward(const Launch& launch, const std::vector<Work<S, Formula, Source>>& list) {
  std::vector<BackwardRows<S, Formula, Source>> rows;
  std::vector<BackwardColumns<S, Formula, Source>> columns;
  std::vector<SumPartials<typename Formula::value_type, typename Formula::parameter_type>> sums;
  for (const auto& work : list) {
    if (work.part.rows) {
      rows.push_back(work.rows());
    } else {
      columns.push_back(work.columns());
    }
    if (work.part.splits > 0) sums.push_back(work.sum());
  }
  launch_together(launch, rows);
  launch_together(launch, columns);
  launch_together(launch, sums);
}

}  // namespace cctorch::cuda::sum_channels
