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

// A load or store of several words at an address that is not a multiple of their size: the device stops there.
struct Misaligned : std::runtime_error {
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

// Blocks run one after the other, so who waits for what another one writes finds it there, or never.
void wait_for_other_block(const std::source_location& where);

// Posts `value` to the warp; returns what lane `source` posted.
uint64_t exchange(uint64_t value, unsigned source, const std::source_location& where);

}  // namespace cctorch::device

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

template <typename T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(T) != 0) throw cctorch::device::Misaligned("__ldg");
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <typename T>
void __stcg(T* to, T value) {
  if (reinterpret_cast<uintptr_t>(to) % alignof(T) != 0) throw cctorch::device::Misaligned("__stcg");
  std::memcpy(to, &value, sizeof(T));
}

inline void __syncthreads(const std::source_location& where = std::source_location::current()) {
  cctorch::device::wait_for_block(where);
}

inline void __threadfence() {}

inline void __nanosleep(unsigned, const std::source_location& where = std::source_location::current()) {
  cctorch::device::wait_for_other_block(where);
}

namespace cctorch::device {

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const std::source_location& where) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != ~0u) throw std::invalid_argument("a shuffle: only whole warps are run");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, source, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cctorch::device

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta,
                 const std::source_location& where = std::source_location::current()) {
  const unsigned lane = threadIdx.x % cctorch::device::kWarp;
  return cctorch::device::shuffle(mask, value, lane < delta ? lane : lane - delta, where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned bits,
                  const std::source_location& where = std::source_location::current()) {
  return cctorch::device::shuffle(mask, value, threadIdx.x % cctorch::device::kWarp ^ bits, where);
}

inline void __syncwarp(const std::source_location& where = std::source_location::current()) {
  cctorch::device::exchange(0, 0, where);
}

// Fibers change places at barriers only, so a plain sum is atomic.
template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}
