#pragma once

namespace cctorch {

// Tells glibc to keep freed memory for the process instead of returning it to the system (MALLOC_MMAP_MAX_=0,
// MALLOC_TRIM_THRESHOLD_, MALLOC_TOP_PAD_). On CPU a training step then spends no time on page faults. Call once, at
// start. Returns false where the C library has no such settings.
bool keep_freed_memory();

// Whether it was called and returned true: what is timed then is timed without page faults.
bool keeps_freed_memory();

}  // namespace cctorch
