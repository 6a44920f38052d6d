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

}  // namespace cctorch
