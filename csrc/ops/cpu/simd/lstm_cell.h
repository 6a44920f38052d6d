#pragma once

#include <cstdint>

#include "csrc/ops/cpu/simd/loops.h"

namespace cctorch::simd {

// One example of n features, of one storage type: its gates are i, f, g and o, n numbers each.
struct LstmCellLoops {
  void (*forward)(const void* gates, const void* c, int64_t n, void* next_h, void* next_c);
  void (*backward)(const void* grad_h, const void* grad_c, const void* gates, const void* c, int64_t n,
                   void* grad_gates, void* grad_previous_c);
};

namespace baseline {
LstmCellLoops lstm_cell(Storage storage);
}
namespace avx2 {
LstmCellLoops lstm_cell(Storage storage);
}
namespace avx512 {
LstmCellLoops lstm_cell(Storage storage);
}

}  // namespace cctorch::simd
