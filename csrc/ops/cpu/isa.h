#pragma once

namespace cctorch {

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa isa() {
  static const Isa detected = [] {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return Isa::kAvx512;
    }
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::kAvx2 : Isa::kBaseline;
  }();
  return detected;
}

// The one of three functions that may be called here; the code of the others may not run.
template <typename Function>
Function for_isa(Function baseline, Function avx2, Function avx512) {
  switch (isa()) {
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx2:
      return avx2;
    default:
      return baseline;
  }
}

}  // namespace cctorch
