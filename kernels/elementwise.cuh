#pragma once

#include <algorithm>

#include "kernels/block.cuh"
#include "kernels/parameters.cuh"
#include "kernels/vector.cuh"

// The forward of an element-wise formula with parameters per channel, over a dense tensor in the order of its memory.
namespace cctorch::cuda::elementwise {

template <typename S, typename Formula, typename Source>
struct ElementWise {
  using T = typename Formula::value_type;
  using P = typename Formula::parameter_type;
  struct Shared {};
  static constexpr int kInFlight = cuda::kInFlight<S>;
  static constexpr int kStep = kThreads * kVector<S>;
  static constexpr int64_t kTile = int64_t(kInFlight) * kStep;

  Formula formula;
  Source source;
  Layout layout;
  S* y;
  const S* x;
  int64_t numel;
  bool aligned;
  Position vector_step;
  Position element_step;

  __device__ S forward(S value, const P& parameter) const {
    return static_cast<S>(formula.forward(static_cast<T>(value), parameter));
  }

  int64_t blocks() const { return ceil_div(numel, kTile); }

  __device__ void operator()(Shared&, int64_t block = blockIdx.x) const {
    const int64_t begin = block * kTile;
    const int64_t end = std::min(begin + kTile, numel);
    if (aligned && end - begin == kTile) {
      vectors(begin + threadIdx.x * kVector<S>);
    } else {
      elements(begin + threadIdx.x, end);
    }
  }

  __device__ void vectors(int64_t first) const {
    Pack<S, kVector<S>> packs[kInFlight];
    CCTORCH_UNROLL
    for (int k = 0; k < kInFlight; ++k) packs[k] = load<kVector<S>>(x + first + k * kStep);
    Position position = Position::of(layout, first);
    P parameters[kVector<S>];
    find(position, parameters);
    // A step over whole periods of channels meets the same parameters again.
    const bool moves = vector_step.channel != 0 || vector_step.within != 0;
    CCTORCH_UNROLL
    for (int k = 0; k < kInFlight; ++k) {
      if (k > 0 && moves) {
        position.advance(layout, vector_step);
        find(position, parameters);
      }
      CCTORCH_UNROLL
      for (int j = 0; j < kVector<S>; ++j) packs[k].values[j] = forward(packs[k].values[j], parameters[j]);
      store(y + first + k * kStep, packs[k]);
    }
  }

  // The parameters of a vector's elements.
  __device__ void find(Position position, P (&parameters)[kVector<S>]) const {
    if (position.shares(layout, kVector<S>)) {
      const P shared = source(formula, position.channel);
      CCTORCH_UNROLL
      for (int j = 0; j < kVector<S>; ++j) parameters[j] = shared;
      return;
    }
    const Position next{layout.inner == 1 ? 1 : 0, layout.inner == 1 ? 0 : 1};
    CCTORCH_UNROLL
    for (int j = 0; j < kVector<S>; ++j) {
      parameters[j] = source(formula, position.channel);
      position.advance(layout, next);
    }
  }

  // What is left of the tensor after the whole tiles, or all of it where it does not begin at a vector.
  __device__ void elements(int64_t first, int64_t end) const {
    Position position = Position::of(layout, first);
    CCTORCH_KEEP_LOOP
    for (int64_t i = first; i < end; i += kThreads) {
      y[i] = forward(x[i], source(formula, position.channel));
      position.advance(layout, element_step);
    }
  }
};

template <typename S, typename Formula, typename Source>
ElementWise<S, Formula, Source> kernel(const Formula& formula, const Source& source, const Layout& layout, S* y,
                                       const S* x, int64_t numel) {
  using Kernel = ElementWise<S, Formula, Source>;
  return {formula,
          source,
          layout,
          y,
          x,
          numel,
          are_aligned<kVector<S>>(y, x),
          Position::of(layout, Kernel::kStep),
          Position::of(layout, kThreads)};
}

// y = formula(x). launch(blocks, kernel) starts a kernel.
template <typename S, typename Formula, typename Source, typename Launch>
void forward(const Launch& launch, const Formula& formula, const Source& source, const Layout& layout, S* y, const S* x,
             int64_t numel) {
  if (numel == 0) return;
  const auto work = kernel(formula, source, layout, y, x, numel);
  launch(work.blocks(), work);
}

}  // namespace cctorch::cuda::elementwise
