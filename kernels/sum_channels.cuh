#pragma once

#include <algorithm>

#include "csrc/ops/formula/layout.h"
#include "kernels/block.cuh"

// The backward of an element-wise formula with one parameter per channel: the gradient of x, and that of the parameters
// as a sum in two stages. Blocks add up the contributions while they are made; then one block for each channel adds up
// what those blocks found. The order is that of the layout and the number of blocks, so sums do not vary.
namespace cctorch::cuda::sum_channels {

using channelwise::Layout;

// What a warp takes of a row at once.
constexpr int64_t kSegment = 2048;

template <typename S, typename Formula>
struct Arguments {
  using T = typename Formula::value_type;
  using P = typename Formula::parameter_type;

  Formula formula;
  Layout layout;
  S* grad_x;
  const S* grad;
  const S* x;
  const P* parameters;

  // Writes the gradient of one element of x; returns its contribution to that of the parameter.
  __device__ P backward(int64_t i, const P& parameter) const {
    const auto gradients = formula.backward(static_cast<T>(grad[i]), static_cast<T>(x[i]), parameter);
    grad_x[i] = static_cast<S>(gradients.x);
    return gradients.parameter;
  }
};

// `splits` blocks for each channel; every warp takes segments of its rows. For layouts with long rows.
template <typename S, typename Formula>
struct BackwardRows {
  using P = typename Formula::parameter_type;
  struct Shared {
    typename Formula::value_type warp_sums[kWarps];
  };

  Arguments<S, Formula> arguments;
  int64_t splits;
  P* partials;  // channels x splits

  __device__ void operator()(Shared& shared) const {
    const Layout& l = arguments.layout;
    const int64_t channel = blockIdx.x / splits;
    const P parameter = arguments.parameters[channel];
    const int64_t per_row = ceil_div(l.inner, kSegment);
    const unsigned lane = threadIdx.x % kWarp;
    P sum{};
    for (int64_t segment = blockIdx.x % splits * kWarps + threadIdx.x / kWarp; segment < l.outer * per_row;
         segment += splits * kWarps) {
      const int64_t outer = per_row == 1 ? segment : segment / per_row;  // spares short rows the division
      const int64_t row = (outer * l.channels + channel) * l.inner;
      const int64_t begin = (segment - outer * per_row) * kSegment;
      const int64_t end = std::min(begin + kSegment, l.inner);
      for (int64_t i = begin + lane; i < end; i += kWarp) sum += arguments.backward(row + i, parameter);
    }
    const P total = block_sum(sum, shared.warp_sums);
    if (threadIdx.x == 0) partials[blockIdx.x] = total;
  }
};

// Each thread adds up a column of outer x (channels * inner), `splits` blocks for every 32 columns. For layouts with
// short rows.
template <typename S, typename Formula>
struct BackwardColumns {
  using P = typename Formula::parameter_type;
  struct Shared {
    P sums[kWarps][kWarp];
  };

  Arguments<S, Formula> arguments;
  int64_t splits;
  P* partials;  // splits x channels x inner

  __device__ void operator()(Shared& shared) const {
    const Layout& l = arguments.layout;
    const int64_t columns = l.channels * l.inner;
    const int64_t split = blockIdx.x % splits;
    const unsigned warp = threadIdx.x / kWarp;
    const unsigned lane = threadIdx.x % kWarp;
    const int64_t column = blockIdx.x / splits * kWarp + lane;
    P sum{};
    if (column < columns) {
      const P parameter = arguments.parameters[column / l.inner];
      for (int64_t row = split * kWarps + warp; row < l.outer; row += splits * kWarps) {
        sum += arguments.backward(row * columns + column, parameter);
      }
    }
    shared.sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= columns) return;
    for (unsigned other = 1; other < kWarps; ++other) sum += shared.sums[other][lane];
    partials[split * columns + column] = sum;
  }
};

// One block for each channel: factor times the sum of its partials, which are outer x channels x inner.
template <typename P>
struct SumPartials {
  struct Shared {
    double warp_sums[kWarps];
  };

  Layout layout;
  const P* partials;
  double factor;
  P* sums;

  __device__ void operator()(Shared& shared) const {
    const int64_t channel = blockIdx.x;
    formula::Wide<P> sum{};
    for (int64_t i = threadIdx.x; i < layout.outer * layout.inner; i += kThreads) {
      const int64_t row = i / layout.inner * layout.channels + channel;
      sum += formula::wide(partials[row * layout.inner + i % layout.inner]);
    }
    const auto total = block_sum(sum, shared.warp_sums);
    if (threadIdx.x == 0) sums[channel] = formula::Narrow<P>::from(total * factor);
  }
};

// How many blocks share a channel or a tile of columns, and the layout of what they find.
struct Partition {
  bool rows;
  int64_t blocks;
  int64_t splits;
  Layout partials;
};

// About `most_blocks` blocks, but no more than have work.
inline Partition partition(const Layout& l, int64_t most_blocks) {
  const bool rows = l.channels == 1 || l.inner >= kWarp;
  const int64_t groups = rows ? l.channels : ceil_div(l.channels * l.inner, kWarp);
  const int64_t warps = rows ? l.outer * ceil_div(l.inner, kSegment) : l.outer;
  const int64_t splits = std::min(ceil_div(warps, kWarps), std::max<int64_t>(1, most_blocks / groups));
  if (rows) return {true, groups * splits, splits, {1, l.channels, splits}};
  return {false, groups * splits, splits, {splits, l.channels, l.inner}};
}

// Writes arguments.grad_x, and to `sums` the gradient of each channel's parameter times factor. launch(blocks, kernel)
// starts a kernel after the ones before; `partials` has room for part.partials.
template <typename S, typename Formula, typename Launch, typename P = typename Formula::parameter_type>
void backward(const Launch& launch, const Arguments<S, Formula>& arguments, const Partition& part, P* partials,
              double factor, P* sums) {
  if (part.rows) {
    launch(part.blocks, BackwardRows<S, Formula>{arguments, part.splits, partials});
  } else {
    launch(part.blocks, BackwardColumns<S, Formula>{arguments, part.splits, partials});
  }
  launch(part.partials.channels, SumPartials<P>{part.partials, partials, factor, sums});
}

}  // namespace cctorch::cuda::sum_channels
