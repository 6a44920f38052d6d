#include "tests/cpp/device/fibers.h"

#include <gtest/gtest.h>

#include <numeric>
#include <string>
#include <vector>

namespace cctorch::device {
namespace {

constexpr unsigned kThreads = 96;

struct Shared {
  unsigned values[kThreads];
  unsigned sum;
};

// Every thread reads what another one wrote.
std::vector<unsigned> reversed(uint32_t seed, bool with_barrier) {
  std::vector<unsigned> out(3 * kThreads);
  launch<Shared>(3, kThreads, seed, [&](Shared& shared) {
    shared.values[threadIdx.x] = threadIdx.x;
    if (with_barrier) __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = shared.values[blockDim.x - 1 - threadIdx.x];
  });
  return out;
}

TEST(Fibers, ABarrierIsPassedTogether) {
  for (const uint32_t seed : {0, 1, 2, 3}) {
    const auto out = reversed(seed, true);
    for (unsigned i = 0; i < out.size(); ++i) EXPECT_EQ(out[i], kThreads - 1 - i % kThreads) << "seed " << seed;
  }
}

TEST(Fibers, AMissingBarrierShows) {
  const auto expected = reversed(0, true);
  for (const uint32_t seed : {0, 1, 2}) EXPECT_NE(reversed(seed, false), expected) << "seed " << seed;
}

// A warp that has read goes on to write before another one reads.
TEST(Fibers, AMissingBarrierBeforeReuseShows) {
  for (const uint32_t seed : {0, 1, 2}) {
    bool wrong = false;
    launch<Shared>(1, kThreads, seed, [&](Shared& shared) {
      for (unsigned round = 0; round < 3; ++round) {
        const unsigned value = __shfl_up_sync(~0u, round, 1);
        shared.values[threadIdx.x] = value;
        __syncthreads();
        wrong |= shared.values[(threadIdx.x + kWarp) % kThreads] != round;
      }
    });
    EXPECT_TRUE(wrong) << "seed " << seed;
  }
}

TEST(Fibers, ShuffleUpReadsTheLaneBelow) {
  for (const uint32_t seed : {0, 1, 2}) {
    std::vector<double> out(kThreads);
    launch<Shared>(1, kThreads, seed, [&](Shared&) {
      double value = threadIdx.x;
      // Repeated without a barrier in between: no lane may overtake another's value.
      for (const unsigned delta : {1u, 2u, 4u}) value = __shfl_up_sync(~0u, value, delta);
      out[threadIdx.x] = value;
    });
    for (unsigned i = 0; i < kThreads; ++i) {
      unsigned lane = i % kWarp;
      for (const unsigned delta : {4u, 2u, 1u}) lane = lane < delta ? lane : lane - delta;
      EXPECT_EQ(out[i], i / kWarp * kWarp + lane) << "thread " << i << ", seed " << seed;
    }
  }
}

TEST(Fibers, ShuffleXorReadsTheOtherLane) {
  std::vector<unsigned> out(kThreads);
  launch<Shared>(1, kThreads, 2, [&](Shared&) { out[threadIdx.x] = __shfl_xor_sync(~0u, threadIdx.x, 5); });
  for (unsigned i = 0; i < kThreads; ++i) EXPECT_EQ(out[i], i ^ 5);
}

TEST(Fibers, AtomicsAddUpAndSharedMemoryIsOfTheBlock) {
  std::vector<unsigned> sums(4);
  launch<Shared>(4, kThreads, 2, [&](Shared& shared) {
    EXPECT_NE(shared.values[threadIdx.x], 7u);
    if (threadIdx.x == 0) shared.sum = 0;
    __syncthreads();
    shared.values[threadIdx.x] = 7;
    atomicAdd(&shared.sum, blockIdx.x);
    __syncthreads();
    sums[blockIdx.x] = shared.sum;
  });
  EXPECT_EQ(sums, (std::vector<unsigned>{0, kThreads, 2 * kThreads, 3 * kThreads}));
}

std::string stuck(const std::function<void()>& body) {
  try {
    launch<Shared>(2, kThreads, 0, [&](Shared&) { body(); });
  } catch (const Stuck& error) {
    return error.what();
  }
  return "";
}

TEST(Fibers, ThreadsThatNeverMeetAreReported) {
  const auto left = stuck([] {
    if (threadIdx.x > 0) __syncthreads();
  });
  EXPECT_NE(left.find("block 0 is stuck: 1 threads have returned; 95 threads wait for the block"), std::string::npos)
      << left;

  const auto divergent = stuck([] {
    if (threadIdx.x < kWarp) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  });
  EXPECT_NE(divergent.find("32 threads wait for the block"), std::string::npos) << divergent;
  EXPECT_NE(divergent.find("64 threads wait for the block"), std::string::npos) << divergent;

  const auto half_warp = stuck([] {
    if (threadIdx.x % kWarp < 16) __shfl_up_sync(~0u, 1, 1);
  });
  EXPECT_NE(half_warp.find("48 threads wait for their warp"), std::string::npos) << half_warp;

  const auto other = stuck([] { __nanosleep(1); });
  EXPECT_NE(other.find("96 threads wait for another block"), std::string::npos) << other;

  // The harness works on after an abandoned block.
  EXPECT_EQ(reversed(0, true)[0], kThreads - 1);
}

TEST(Fibers, AMisalignedVectorIsReported) {
  alignas(16) unsigned words[8]{};
  const auto copy = [&](const unsigned* from, unsigned* to) {
    launch<Shared>(1, kThreads, 0, [&](Shared&) {
      if (threadIdx.x == 0) __stcg(reinterpret_cast<uint4*>(to), __ldg(reinterpret_cast<const uint4*>(from)));
    });
  };
  EXPECT_NO_THROW(copy(words, words + 4));
  EXPECT_THROW(copy(words + 1, words + 4), Misaligned);
  EXPECT_THROW(copy(words, words + 2), Misaligned);
}

TEST(Fibers, OnlyWholeWarps) {
  EXPECT_THROW(launch<Shared>(1, 33, 0, [](Shared&) {}), std::invalid_argument);
}

}  // namespace
}  // namespace cctorch::device
