#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/select.cuh"
#include "kernels/vector.cuh"

// The scores of groups of weights, channels or blocks.
namespace cctorch::cuda::group_masks {

using select::Count;
using select::State;

// A weight as a matrix, cut into blocks of rows x columns, `across` of them next to each other. `first` is the position
// of its element 0 in the concatenation of all weights, `first_group` that of its group 0 among all groups.
struct Weight {
  const void* from;
  bool* mask;
  int64_t first;
  int64_t first_group;
  int64_t rows;
  int64_t columns;
  int64_t across;

  // The first element of a group, and how far its rows are apart.
  __device__ int64_t corner(int64_t group) const { return (group / across * rows * across + group % across) * columns; }
  __device__ int64_t row_stride() const { return across * columns; }
};

// A group whose score may be the threshold.
struct Candidate {
  Count key;
  Count group;
};

// Scratch memory on the device.
struct Workspace {
  // These have to be 0.
  State* state;
  Count* last;        // of the groups that score the threshold, the last one that is kept
  Count* candidates;  // how many there are
  Count* histogram;
  // These need not be set.
  double* scores;
  Candidate* list;
  Weight* weights;
  Entry* entries;  // the scores as a list of one

  static int64_t cleared_bytes() { return sizeof(State) + (2 + select::kBins) * sizeof(Count); }
  static int64_t bytes(int64_t groups, int64_t weights) {
    return groups * (sizeof(double) + sizeof(Candidate)) + (weights + 1) * sizeof(Weight) + 2 * sizeof(Entry);
  }
  static Workspace at(void* cleared, void* memory, int64_t groups, int64_t weights) {
    auto* state = static_cast<State*>(cleared);
    auto* counts = reinterpret_cast<Count*>(state + 1);
    auto* list = static_cast<Candidate*>(memory);
    auto* scores = reinterpret_cast<double*>(list + groups);
    auto* table = reinterpret_cast<Weight*>(scores + groups);
    return {state, counts, counts + 1, counts + 2, scores, list, table, reinterpret_cast<Entry*>(table + weights + 1)};
  }
};

using Key = formula::MagnitudeOrNan<Count>;
constexpr Count kInfinity = 0x7ff0000000000000;

__device__ inline Count key_of(double score) {
  Count bits;
  memcpy(&bits, &score, sizeof(bits));
  return Key{kInfinity}(bits);
}

// The norms of the groups, each by `team` neighbouring threads. The list travels as an argument, and is left on the
// device for the kernels after this one.
template <typename S>
struct Score {
  struct Shared {
    bool last;
  };
  static constexpr int64_t kWeights = 64;  // within the 4 KB that arguments may have

  Weight part[kWeights + 1];
  int64_t size;
  int64_t begin;  // the place of part[0] among all weights
  Workspace workspace;
  int64_t groups;  // of all weights
  Count wanted;
  int team;
  bool channels;  // scores are means, and the best one of a weight goes before all others

  __device__ void operator()(Shared& shared) const {
    if (blockIdx.x == 0) leave_list();
    const unsigned lane = threadIdx.x % kWarp;
    const int64_t end = part[size].first_group;
    const int64_t per_warp = kWarp / team;
    const int64_t step = gridDim.x * kWarps * per_warp;
    // The lanes of a warp stay together: they exchange sums.
    for (int64_t of_warp = part[0].first_group + (blockIdx.x * kWarps + threadIdx.x / kWarp) * per_warp; of_warp < end;
         of_warp += step) {
      const int64_t group = of_warp + lane / team;
      const Weight& weight = part[group < end ? weight_of(group) : 0];
      double sum = group < end ? squares(weight, group - weight.first_group, lane % team) : 0;
      for (int other = team / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffff, sum, other);
      if (group < end && lane % team == 0) workspace.scores[group] = score(weight, sum);
    }
    if (channels && is_last_block(&workspace.state->finished, &shared.last)) put_best_ahead();
  }

  __device__ void leave_list() const {
    for (int64_t i = threadIdx.x; i <= size; i += kThreads) workspace.weights[begin + i] = part[i];
    if (threadIdx.x > 0) return;
    // No score reaches all bits: the threshold of no group at all.
    workspace.state->threshold = wanted > 0 ? 0 : ~Count(0);
    workspace.state->wanted = wanted;
    workspace.entries[0] = {workspace.scores, nullptr, 0};
    workspace.entries[1] = {nullptr, nullptr, groups};
  }

  __device__ int64_t weight_of(int64_t group) const {
    return last_from(size, group, [&](int64_t i) { return part[i].first_group; });
  }

  // The sum over every team-th element of the group.
  __device__ double squares(const Weight& weight, int64_t group, int64_t first) const {
    const auto* from = static_cast<const S*>(weight.from) + weight.corner(group);
    double sum = 0;
    const auto add = [&](S element) {
      const auto value = static_cast<double>(element);
      sum += value * value;
    };
    if (weight.rows == 1) {
      // Without the branches of the loop below, several elements are loaded before the first is used.
      CCTORCH_UNROLL_4
      for (int64_t i = first; i < weight.columns; i += team) add(from[i]);
      return sum;
    }
    const int64_t stride = weight.row_stride();
    const int64_t down = team / weight.columns;
    const int64_t right = team % weight.columns;
    int64_t row = first / weight.columns;
    int64_t column = first % weight.columns;
    while (row < weight.rows) {
      add(from[row * stride + column]);
      row += down;
      column += right;
      if (column >= weight.columns) {
        column -= weight.columns;
        ++row;
      }
    }
    return sum;
  }

  __device__ double score(const Weight& weight, double sum) const {
    const double norm = std::sqrt(sum);
    return channels ? norm / std::sqrt(static_cast<double>(weight.rows * weight.columns)) : norm;
  }

  // A warp for each weight: its best score, the first of several, becomes infinite, and no other one is.
  __device__ void put_best_ahead() const {
    const unsigned lane = threadIdx.x % kWarp;
    for (int64_t i = threadIdx.x / kWarp; i < size; i += kWarps) {
      const int64_t end = part[i + 1].first_group;
      Count best = 0;
      int64_t place = end;
      for (int64_t group = part[i].first_group + lane; group < end; group += kWarp) {
        const double score = read(&workspace.scores[group]);
        take_better(key_of(score), group, best, place);
        if (score > std::numeric_limits<double>::max()) workspace.scores[group] = std::numeric_limits<double>::max();
      }
      for (unsigned other = kWarp / 2; other > 0; other /= 2) {
        const Count key = __shfl_xor_sync(0xffffffff, best, other);
        take_better(key, __shfl_xor_sync(0xffffffff, place, other), best, place);
      }
      __syncwarp();  // before the score is clamped by another lane
      if (lane == 0) workspace.scores[place] = std::numeric_limits<double>::infinity();
    }
    if (threadIdx.x == 0) workspace.state->finished = 0;
  }

  __device__ static void take_better(Count key, int64_t group, Count& best, int64_t& place) {
    if (key < best || (key == best && group >= place)) return;
    best = key;
    place = group;
  }
};

}  // namespace cctorch::cuda::group_masks
