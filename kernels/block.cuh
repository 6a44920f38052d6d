#pragma once

#include "csrc/ops/formula/parameters.h"

// What the threads of a block do together. Device code in headers is plain CUDA: nvcc compiles it, and so does a C++
// compiler after tests/cpp/device/fibers.h, which runs it on the CPU.
namespace cctorch::cuda {

constexpr unsigned kThreads = 256;
constexpr unsigned kWarp = 32;
constexpr unsigned kWarps = kThreads / kWarp;

template <typename T>
struct Scan {
  T before;  // the sum of the values of all threads before this one
  T total;
};

// Called by all threads of the block.
template <typename T>
__device__ Scan<T> block_scan(T value, T* warp_sums) {
  const unsigned lane = threadIdx.x % kWarp;
  const unsigned warp = threadIdx.x / kWarp;
  T sum = value;
  for (unsigned delta = 1; delta < kWarp; delta *= 2) {
    const T below = __shfl_up_sync(0xffffffff, sum, delta);
    if (lane >= delta) sum += below;
  }
  if (lane == kWarp - 1) warp_sums[warp] = sum;
  __syncthreads();
  Scan<T> scan{sum - value, 0};
  for (unsigned i = 0; i < kWarps; ++i) {
    if (i < warp) scan.before += warp_sums[i];
    scan.total += warp_sums[i];
  }
  __syncthreads();  // warp_sums may be written again
  return scan;
}

// The largest value of all threads. Called by all threads of the block.
template <typename T>
__device__ T block_max(T value, T* warp_values) {
  const unsigned lane = threadIdx.x % kWarp;
  for (unsigned delta = 1; delta < kWarp; delta *= 2) {
    const T below = __shfl_up_sync(0xffffffff, value, delta);
    if (lane >= delta && below > value) value = below;
  }
  if (lane == kWarp - 1) warp_values[threadIdx.x / kWarp] = value;
  __syncthreads();
  T largest = warp_values[0];
  for (unsigned i = 1; i < kWarps; ++i) largest = warp_values[i] > largest ? warp_values[i] : largest;
  __syncthreads();  // warp_values may be written again
  return largest;
}

template <typename T>
__device__ T block_sum(T value, T* warp_sums) {
  return block_scan(value, warp_sums).total;
}

template <typename T>
__device__ formula::Pair<T> block_sum(const formula::Pair<T>& value, T* warp_sums) {
  const T first = block_scan(value.first, warp_sums).total;
  return {first, block_scan(value.second, warp_sums).total};
}

// The same for every thread of the warp. Called by all of them.
template <typename T>
__device__ T warp_sum(T value) {
  for (unsigned other = kWarp / 2; other > 0; other /= 2) value += __shfl_xor_sync(0xffffffff, value, other);
  return value;
}

template <typename T>
__device__ formula::Pair<T> warp_sum(const formula::Pair<T>& value) {
  return {warp_sum(value.first), warp_sum(value.second)};
}

// What other blocks write while the kernel runs.
template <typename T>
__device__ T read(const T* from) {
  return *const_cast<const volatile T*>(from);
}
template <typename T>
__device__ void write(T* to, T value) {
  *const_cast<volatile T*>(to) = value;
}

// Whether all other blocks of the kernel have come here before; what they wrote until then can be read. `finished` is 0
// before the first of them. Called by all threads of the block.
__device__ inline bool is_last_block(unsigned* finished, bool* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *shared = atomicAdd(finished, 1u) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  return *shared;
}

}  // namespace cctorch::cuda
