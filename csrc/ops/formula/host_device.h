#pragma once

// Always inlined on the host: the same function is compiled for several instruction sets, and an out-of-line copy from
// one of them must not serve another.
#ifdef __CUDACC__
#define CCTORCH_HOST_DEVICE __host__ __device__ inline
#else
#define CCTORCH_HOST_DEVICE __attribute__((always_inline)) inline
#endif
