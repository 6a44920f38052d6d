#pragma once

#include "csrc/ops/formula/layout.h"
#include "csrc/ops/formula/parameters.h"

// How the elements of a tensor find the parameters of their channels.
namespace cctorch::cuda {

using channelwise::Layout;

// The parameters as they are in memory: an array for each of their numbers.
template <typename Formula>
struct Given {
  using T = typename Formula::value_type;
  using P = typename Formula::parameter_type;

  const T* numbers[formula::numbers_in<P>];

  __device__ P operator()(const Formula&, int64_t channel) const {
    if constexpr (formula::is_pair<P>) {
      return {numbers[0][channel], numbers[1][channel]};
    } else {
      return numbers[0][channel];
    }
  }
};

// The formula makes its parameter of what is in memory: a scale of its logarithm, for example.
template <typename Formula>
struct Raw {
  Given<Formula> given;

  __device__ auto operator()(const Formula& formula, int64_t channel) const {
    return formula.parameter(given(formula, channel));
  }
};

// Where the gradients of parameters go, in the same way.
template <typename T, typename P>
struct Totals {
  T* numbers[formula::numbers_in<P>];

  __device__ void set(int64_t channel, const P& total) const {
    if constexpr (formula::is_pair<P>) {
      numbers[0][channel] = total.first;
      numbers[1][channel] = total.second;
    } else {
      numbers[0][channel] = total;
    }
  }
};

// The channel of an element, and how far into its row of that channel it is. Dividing is slow: a thread does it once
// and advances from there.
struct Position {
  int64_t channel;
  int64_t within;

  CCTORCH_HOST_DEVICE static Position of(const Layout& layout, int64_t element) {
    if (layout.channels == 1) return {0, 0};
    const int64_t row = element / layout.inner;
    return {row % layout.channels, element - row * layout.inner};
  }

  __device__ void advance(const Layout& layout, const Position& distance) {
    channel += distance.channel;
    within += distance.within;
    if (within >= layout.inner) {
      within -= layout.inner;
      ++channel;
    }
    if (channel >= layout.channels) channel -= layout.channels;
  }

  // Whether the next `count` elements are of one channel.
  __device__ bool shares(const Layout& layout, int64_t count) const {
    return layout.channels == 1 || within + count <= layout.inner;
  }
};

}  // namespace cctorch::cuda
