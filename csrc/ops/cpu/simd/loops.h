#pragma once

#include <cstdint>

#include "csrc/ops/cpu/simd/stores.h"
#include "csrc/ops/formula/channel_gate.h"
#include "csrc/ops/formula/fake_quant.h"
#include "csrc/ops/formula/float_quant.h"
#include "csrc/ops/formula/soft_threshold.h"

namespace cctorch::simd {

enum class Storage { kFloat, kDouble, kHalf, kBFloat16 };

// The loops of one formula over one storage type. x, y and gradients are of the storage type, parameters of the
// formula's.
template <typename Formula>
struct Loops {
  using T = typename Formula::value_type;
  using P = typename Formula::parameter_type;
  using Parameters = formula::Columns<const T, P>;
  using Sums = formula::Columns<T, P>;

  // n elements that share their parameter
  void (*forward)(const Formula&, void* y, const void* x, int64_t n, P parameter, Stores stores);
  formula::Wide<P> (*backward)(const Formula&, void* grad_x, const void* grad, const void* x, int64_t n, P parameter,
                               Stores stores);

  // n elements with a parameter each; backward adds to grad_parameters
  void (*forward_each)(const Formula&, void* y, const void* x, int64_t n, Parameters parameters, Stores stores);
  void (*backward_each)(const Formula&, void* grad_x, const void* grad, const void* x, int64_t n, Parameters parameters,
                        Sums grad_parameters, Stores stores);
};

// Every formula that the loops are compiled for, with float and with double arithmetic.
#define CCTORCH_FOR_EACH_FORMULA(f) \
  f(ChannelGate) f(FakeQuant) f(FakeQuantOffset) f(Pact) f(FloatQuant) f(SoftThreshold)

#define CCTORCH_DECLARE_FORMULA(name)                         \
  extern template Loops<formula::name<float>> loops(Storage); \
  extern template Loops<formula::name<double>> loops(Storage);

#define CCTORCH_DECLARE_LOOPS(isa)                  \
  namespace isa {                                   \
  template <typename Formula>                       \
  Loops<Formula> loops(Storage);                    \
  CCTORCH_FOR_EACH_FORMULA(CCTORCH_DECLARE_FORMULA) \
  }

CCTORCH_DECLARE_LOOPS(baseline)
CCTORCH_DECLARE_LOOPS(avx2)
CCTORCH_DECLARE_LOOPS(avx512)
#undef CCTORCH_DECLARE_LOOPS
#undef CCTORCH_DECLARE_FORMULA

}  // namespace cctorch::simd
