#pragma once

#include <cmath>
#include <cstdint>

#include "csrc/ops/formula/least_squares.h"
#include "kernels/block.cuh"

// The searches of csrc/ops/row_fits.h, whose steps are too small to be launched one by one.
namespace cctorch::cuda::row_fit {

// The largest level of each row's grid of 2 q + 1 levels. One block for each row.
struct SearchReach {
  struct Shared {
    double warp_values[kWarps];
  };
  static constexpr int kMostClips = 64;

  const double* rows;
  double* reach;
  int64_t size;
  double q;
  int refinements;
  int clips;
  double clip[kMostClips];  // of the largest magnitude, where the search begins

  struct Fit {
    double reach, error;
  };

  // All threads have the same sums, so they go the same way.
  __device__ void operator()(Shared& shared) const {
    const double* row = rows + blockIdx.x * size;
    double own_largest = 0, own_energy = 0;
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      own_largest = std::fmax(own_largest, std::abs(row[i]));
      own_energy += row[i] * row[i];
    }
    const double largest = block_max(own_largest, shared.warp_values);
    const double energy = block_sum(own_energy, shared.warp_values);
    // The best reach, up to the largest magnitude, for the codes that `from` gives.
    Fit best{largest, energy};
    for (int i = 0; i <= clips + refinements; ++i) {
      const double from = i == 0 ? largest : (i <= clips ? largest * clip[i - 1] : best.reach);
      const double divisor = from > 0 ? from : 1.0;
      double own_dot = 0, own_square = 0;
      for (int64_t k = threadIdx.x; k < size; k += kThreads) {
        const double code = std::fmin(std::fmax(std::rint(row[k] / divisor * q), -q), q);
        own_dot += row[k] * code;
        own_square += code * code;
      }
      const double dot = block_sum(own_dot, shared.warp_values);
      const double square = block_sum(own_square, shared.warp_values);
      const double fitted = std::fmin(dot / std::fmax(square, 1.0) * q, largest);
      const double step = fitted / q;
      const double error = energy - 2 * step * dot + step * step * square;
      if (i == 0 || error < best.error) {
        best = {fitted, error};
      } else if (i > clips) {
        break;
      }
    }
    if (threadIdx.x == 0) reach[blockIdx.x] = best.reach;
  }
};

// A row in ascending order, and its running sums from 0 on.
struct SortedRow {
  const double* values;
  const double* sums;
  int64_t size;

  // How many are at most `bound`.
  __device__ int64_t up_to(double bound) const {
    int64_t low = 0;
    for (int64_t high = size; low < high;) {
      const int64_t middle = (low + high) / 2;
      if (values[middle] <= bound) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

struct SortedRows {
  const double* values;
  const double* sums;
  int64_t size;

  __device__ SortedRow operator[](int64_t row) const { return {values + row * size, sums + row * (size + 1), size}; }
};

// Iterations of Lloyd's algorithm, from several starts for each row. One block for each of them, a thread for each
// level.
struct Lloyd {
  static constexpr int64_t kMostLevels = kThreads;
  struct Shared {
    double levels[kMostLevels];
    int64_t ends[kMostLevels];
  };

  SortedRows rows;
  double* levels;  // rows x starts x count, ascending
  int64_t starts;
  int64_t count;
  int iterations;

  __device__ void operator()(Shared& shared) const {
    const SortedRow row = rows[blockIdx.x / starts];
    double* own = levels + blockIdx.x * count;
    const int64_t i = threadIdx.x;
    if (i < count) shared.levels[i] = own[i];
    __syncthreads();
    for (int iteration = 0; iteration < iterations; ++iteration) {
      if (i < count) {
        shared.ends[i] = i + 1 < count ? row.up_to((shared.levels[i] + shared.levels[i + 1]) / 2) : row.size;
      }
      __syncthreads();
      if (i < count) {
        const int64_t begin = i > 0 ? shared.ends[i - 1] : 0, end = shared.ends[i];
        if (end > begin) shared.levels[i] = (row.sums[end] - row.sums[begin]) / static_cast<double>(end - begin);
      }
      __syncthreads();
    }
    if (i < count) own[i] = shared.levels[i];
  }
};

// Turns of nearest levels and least squares for the scales of three binary codes. One warp for each row, a lane for
// each of the 8 levels.
struct Alternate {
  struct Shared {};
  static constexpr int kBits = 3;
  static constexpr unsigned kLevels = 1u << kBits;

  SortedRows rows;
  double* scales;  // rows x 3
  int64_t count;
  int turns;

  __device__ static double sign_in(unsigned code, int bit) { return (code >> bit & 1) != 0 ? 1.0 : -1.0; }

  __device__ static double level(unsigned code, const double* scale) {
    return sign_in(code, 0) * scale[0] + sign_in(code, 1) * scale[1] + sign_in(code, 2) * scale[2];
  }

  // Where the cell of the level of `code` begins and ends in the row; of equal levels the lower code's is first.
  struct Cell {
    int64_t begin, end;
  };
  __device__ static Cell cell(const SortedRow& row, unsigned code, const double* scale) {
    const double own = level(code, scale);
    double below = 0, above = 0;
    bool is_first = true, is_last = true;
    for (unsigned other = 0; other < kLevels; ++other) {
      const double its = level(other, scale);
      if (its < own || (its == own && other < code)) {
        below = is_first ? its : std::fmax(below, its);
        is_first = false;
      } else if (other != code) {
        above = is_last ? its : std::fmin(above, its);
        is_last = false;
      }
    }
    return {is_first ? 0 : row.up_to((below + own) / 2), is_last ? row.size : row.up_to((own + above) / 2)};
  }

  __device__ void operator()(Shared&) const {
    const int64_t number = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarp;
    if (number >= count) return;
    const SortedRow row = rows[number];
    const unsigned code = threadIdx.x % kWarp;
    double scale[kBits];
    for (int i = 0; i < kBits; ++i) scale[i] = scales[number * kBits + i];
    for (int turn = 0; turn < turns; ++turn) {
      double members = 0, sum = 0;
      if (code < kLevels) {
        const Cell own = cell(row, code, scale);
        members = static_cast<double>(own.end - own.begin);
        sum = row.sums[own.end] - row.sums[own.begin];
      }
      double moment[kBits], gram[kBits][kBits];
      for (int p = 0; p < kBits; ++p) {
        moment[p] = warp_sum(sign_in(code, p) * sum);
        gram[p][p] = static_cast<double>(row.size);
        for (int q = 0; q < p; ++q) gram[p][q] = gram[q][p] = warp_sum(sign_in(code, p) * sign_in(code, q) * members);
      }
      formula::least_squares(gram, moment, scale, kBits);
    }
    if (code < kBits) {
      scales[number * kBits + code] = code == 0 ? scale[0] : (code == 1 ? scale[1] : scale[2]);
    }
  }
};

}  // namespace cctorch::cuda::row_fit
