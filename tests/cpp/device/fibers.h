#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>

// Runs CUDA device code on the CPU. The kernels' headers are plain CUDA: included after this one they compile as C++,
// and launch() runs them, block after block, each thread of a block as a fiber.
//
// What a device leaves open is decided by a seed: the order of the blocks, of a block's warps between two barriers, and
// of a warp's threads between two exchanges. 0 is ascending, 1 descending, others are random. So code that lacks a
// barrier reads what is not there yet, or no longer.

#define __device__

struct Dim3 {
  unsigned x;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cctorch::device {

constexpr unsigned kWarp = 32;

// Threads wait for each other where they never meet: some returned, or wait somewhere else.
struct Stuck : std::runtime_error {
  using runtime_error::runtime_error;
};

// Runs body(shared) for all threads of all blocks. Every block has shared memory of its own, full of garbage.
void launch(unsigned blocks, unsigned threads, uint32_t seed, size_t shared_bytes,
            const std::function<void(void* shared)>& body);

template <typename Shared, typename Body>
void launch(unsigned blocks, unsigned threads, uint32_t seed, const Body& body) {
  launch(blocks, threads, seed, sizeof(Shared), [&](void* shared) { body(*static_cast<Shared*>(shared)); });
}

void wait_for_block(const std::source_location& where);

// Posts `value` to the warp; returns what lane `source` posted.
uint64_t exchange(uint64_t value, unsigned source, const std::source_location& where);

}  // namespace cctorch::device

inline void __syncthreads(const std::source_location& where = std::source_location::current()) {
  cctorch::device::wait_for_block(where);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta,
                 const std::source_location& where = std::source_location::current()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != ~0u) throw std::invalid_argument("__shfl_up_sync: only whole warps are run");
  const unsigned lane = threadIdx.x % cctorch::device::kWarp;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = cctorch::device::exchange(bits, lane < delta ? lane : lane - delta, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Fibers change places at barriers only, so a plain sum is atomic.
template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}
