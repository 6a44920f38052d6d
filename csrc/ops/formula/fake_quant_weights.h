#pragma once

#include <limits>

#include "csrc/ops/formula/fake_quant.h"
#include "csrc/ops/formula/mask.h"

namespace cctorch::formula {

// The magnitude's bits, 0 for NaN: the largest of them is the largest number.
template <typename Bits>
CCTORCH_HOST_DEVICE Bits magnitude_of_number(Bits bits, Bits infinity) {
  const Bits key = magnitude(bits);
  return key > infinity ? Bits(0) : key;
}

template <typename T>
struct FakeQuantWeights {
  using value_type = T;
  FakeQuant<T> grid;

  CCTORCH_HOST_DEVICE static FakeQuantWeights with_qmax(int64_t qmax) {
    return {{static_cast<T>(-qmax), static_cast<T>(qmax)}};
  }

  // In the normal range, so that it is positive; and such that qmax times it is finite, also once rounded.
  CCTORCH_HOST_DEVICE T scale(T largest) const {
    const T high = (1 - 2 * std::numeric_limits<T>::epsilon()) * std::numeric_limits<T>::max() / grid.qmax;
    return clamp(largest / grid.qmax, std::numeric_limits<T>::min(), high);
  }
};

}  // namespace cctorch::formula
