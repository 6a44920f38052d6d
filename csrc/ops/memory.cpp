#include <cctorch/memory.h>

#include <atomic>
#include <cstdlib>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace cctorch {

namespace {

std::atomic<bool> kept = false;

}  // namespace

bool keep_freed_memory() {
#ifdef __GLIBC__
  constexpr int kTopPad = 64 << 20;
  kept = mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, -1) == 1 && mallopt(M_TOP_PAD, kTopPad) == 1;
#endif
  return kept;
}

bool keeps_freed_memory() { return kept; }

}  // namespace cctorch
