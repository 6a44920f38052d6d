#include <cctorch/memory.h>
#include <gtest/gtest.h>

namespace cctorch {
namespace {

TEST(Memory, SettingsAreTaken) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "the sanitizer's allocator has no such settings";
#endif
#if defined(__GLIBC__)
  EXPECT_TRUE(keep_freed_memory());
  EXPECT_TRUE(keeps_freed_memory());
#else
  EXPECT_FALSE(keep_freed_memory());
#endif
}

}  // namespace
}  // namespace cctorch
