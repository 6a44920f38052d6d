#pragma once

#include <limits>
#include <vector>

#include "tests/cpp/device/fibers.h"

#include "kernels/parameters.cuh"

namespace cctorch::device {

// Parameters of channels in the arrays that kernels read.
template <typename Formula>
struct Parameters {
  using T = typename Formula::value_type;
  using P = typename Formula::parameter_type;
  std::vector<T> numbers[formula::numbers_in<P>];

  explicit Parameters(const std::vector<P>& channels) {
    for (const P& parameter : channels) {
      if constexpr (formula::is_pair<P>) {
        numbers[0].push_back(parameter.first);
        numbers[1].push_back(parameter.second);
      } else {
        numbers[0].push_back(parameter);
      }
    }
  }
  cuda::Given<Formula> given() const {
    cuda::Given<Formula> result{};
    for (int64_t i = 0; i < formula::numbers_in<P>; ++i) result.numbers[i] = numbers[i].data();
    return result;
  }
};

// Arrays that kernels write the gradients of parameters to.
template <typename Formula>
struct Sums {
  using T = typename Formula::value_type;
  using P = typename Formula::parameter_type;
  std::vector<T> numbers[formula::numbers_in<P>];

  explicit Sums(int64_t channels) {
    for (auto& each : numbers) each.assign(channels, std::numeric_limits<T>::quiet_NaN());
  }
  cuda::Totals<T, P> totals() {
    cuda::Totals<T, P> result{};
    for (int64_t i = 0; i < formula::numbers_in<P>; ++i) result.numbers[i] = numbers[i].data();
    return result;
  }
  std::vector<P> of_channels() const {
    std::vector<P> result;
    for (size_t c = 0; c < numbers[0].size(); ++c) {
      if constexpr (formula::is_pair<P>) {
        result.push_back({numbers[0][c], numbers[1][c]});
      } else {
        result.push_back(numbers[0][c]);
      }
    }
    return result;
  }
};

}  // namespace cctorch::device
