#pragma once

#include <cstdint>

#include "csrc/ops/formula/channel_gate.h"
#include "csrc/ops/formula/fake_quant.h"
#include "csrc/ops/formula/soft_threshold.h"

namespace cctorch::simd {

enum class Storage { kFloat, kDouble, kHalf, kBFloat16 };

// The loops of one formula over one storage type. x, y and gradients are of the storage type, parameters of the
// formula's.
template <typename Formula>
struct Loops {
  using T = typename Formula::value_type;

  // n elements that share one parameter
  void (*forward)(const Formula&, void* y, const void* x, int64_t n, T parameter);
  double (*backward)(const Formula&, void* grad_x, const void* grad, const void* x, int64_t n, T parameter);

  // n elements with one parameter each; backward adds to grad_parameters
  void (*forward_each)(const Formula&, void* y, const void* x, int64_t n, const T* parameters);
  void (*backward_each)(const Formula&, void* grad_x, const void* grad, const void* x, int64_t n, const T* parameters,
                        T* grad_parameters);
};

#define CCTORCH_DECLARE_LOOPS(isa)                                      \
  namespace isa {                                                       \
  template <typename Formula>                                           \
  Loops<Formula> loops(Storage);                                        \
  extern template Loops<formula::FakeQuant<float>> loops(Storage);      \
  extern template Loops<formula::FakeQuant<double>> loops(Storage);     \
  extern template Loops<formula::ChannelGate<float>> loops(Storage);    \
  extern template Loops<formula::ChannelGate<double>> loops(Storage);   \
  extern template Loops<formula::SoftThreshold<float>> loops(Storage);  \
  extern template Loops<formula::SoftThreshold<double>> loops(Storage); \
  }

CCTORCH_DECLARE_LOOPS(baseline)
CCTORCH_DECLARE_LOOPS(avx2)
CCTORCH_DECLARE_LOOPS(avx512)
#undef CCTORCH_DECLARE_LOOPS

}  // namespace cctorch::simd
