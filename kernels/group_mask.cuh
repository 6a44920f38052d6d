#pragma once

#include <algorithm>
#include <vector>

#include "kernels/group_score.cuh"
#include "kernels/mask.cuh"

// Masks of groups of weights: exact selection among the groups' scores. Five launches for a list of weights that fits
// into one launch's arguments, after memory was cleared once.
namespace cctorch::cuda::group_masks {

// Finds the threshold among the scores that agree with its upper digits, and which of its equals are kept: all blocks
// collect them, the block that ends last decides.
struct Finish {
  struct Shared {
    unsigned counts[select::kBins];
    Count warp_sums[kWarps];
    Count place;
    Count found;
    Count wanted;
    bool last;
  };

  Workspace workspace;
  int64_t groups;
  int64_t span;
  int unknown;  // bits below the digits that are found

  __device__ void operator()(Shared& shared) const {
    collect(shared);
    if (is_last_block(&workspace.state->finished, &shared.last)) decide(shared);
  }

  __device__ void collect(Shared& shared) const {
    const Count agreed = workspace.state->threshold >> unknown;
    const int64_t begin = blockIdx.x * span;
    const int64_t end = std::min(begin + span, groups);
    for (int64_t first = begin; first < end; first += kThreads) {
      const int64_t group = first + threadIdx.x;
      const Count key = group < end ? key_of(workspace.scores[group]) : 0;
      const bool agrees = group < end && key >> unknown == agreed;
      const Scan<Count> scan = block_scan(static_cast<Count>(agrees), shared.warp_sums);
      if (scan.total == 0) continue;
      if (threadIdx.x == 0) shared.place = atomicAdd(workspace.candidates, scan.total);
      __syncthreads();
      if (agrees) workspace.list[shared.place + scan.before] = {key, static_cast<Count>(group)};
    }
  }

  __device__ void decide(Shared& shared) const {
    State* state = workspace.state;
    if (threadIdx.x == 0) {
      shared.found = state->threshold;
      shared.wanted = state->wanted;
    }
    __syncthreads();
    refine(
        shared, unknown, [](const Candidate& candidate) { return candidate.key; },
        [](const Candidate&) { return true; });
    const Count threshold = shared.found;
    __syncthreads();
    if (threadIdx.x == 0) shared.found = 0;
    __syncthreads();
    // The first ones are the largest of what is left behind them.
    const auto end = static_cast<Count>(groups - 1);
    int bits = 0;
    for (; end >> bits > 0;) ++bits;
    refine(
        shared, bits, [&](const Candidate& candidate) { return end - candidate.group; },
        [&](const Candidate& candidate) { return candidate.key == threshold; });
    if (threadIdx.x > 0) return;
    state->threshold = threshold;
    *workspace.last = end - shared.found;
  }

  // Adds to `found` the lower `bits` of the `wanted` largest of the candidates' values.
  template <typename Value, typename Counts>
  __device__ void refine(Shared& shared, int bits, const Value& value, const Counts& counts) const {
    const auto size = static_cast<int64_t>(read(workspace.candidates));
    for (int top = bits; top > 0; top -= select::kDigitBits) {
      const int width = top < select::kDigitBits ? top : select::kDigitBits;
      const int shift = top - width;
      for (unsigned bin = threadIdx.x; bin < select::kBins; bin += kThreads) shared.counts[bin] = 0;
      __syncthreads();
      for (int64_t i = threadIdx.x; i < size; i += kThreads) {
        const Candidate candidate{read(&workspace.list[i].key), read(&workspace.list[i].group)};
        if (!counts(candidate) || value(candidate) >> top != shared.found >> top) continue;
        atomicAdd(&shared.counts[value(candidate) >> shift & ((1u << width) - 1)], 1u);
      }
      __syncthreads();
      select::find_bin([&](unsigned bin) { return static_cast<Count>(shared.counts[bin]); }, shared.wanted,
                       shared.warp_sums,
                       [&](unsigned bin, Count left) {
                         shared.found |= static_cast<Count>(bin) << shift;
                         shared.wanted = left;
                       });
      __syncthreads();
    }
  }
};

// Every element of a mask says whether its group is kept.
struct WriteMasks {
  using Shared = NoShared;
  static constexpr int kElements = kVector<bool>;

  List<Weight> list;
  Workspace workspace;

  __device__ void operator()(Shared&) const {
    list.for_each_piece(blockIdx.x, [&](const Weight& weight, int64_t begin, int64_t end) {
      // A vector belongs to the piece that it begins in.
      const int64_t first = ceil_div(begin, kElements) * kElements;
      for (int64_t i = first + threadIdx.x * kElements; i < end; i += kThreads * kElements) {
        const int64_t left = (&weight)[1].first - weight.first - i;
        write_vector(weight, i, static_cast<int>(std::min<int64_t>(kElements, left)));
      }
    });
  }

  __device__ bool keeps(Count group) const {
    const Count key = key_of(workspace.scores[group]);
    const Count threshold = workspace.state->threshold;
    return key > threshold || (key == threshold && group <= *workspace.last);
  }

  __device__ void write_vector(const Weight& weight, int64_t begin, int count) const {
    const int64_t row = begin / (weight.across * weight.columns);
    const int64_t in_row = begin - row * (weight.across * weight.columns);
    int64_t across = in_row / weight.columns;
    int64_t column = in_row - across * weight.columns;
    int64_t down = row % weight.rows;
    int64_t groups_above = weight.first_group + row / weight.rows * weight.across;
    bool kept = keeps(groups_above + across);
    Pack<bool, kElements> pack{};
    CCTORCH_UNROLL
    for (int j = 0; j < kElements; ++j) {
      pack.values[j] = kept;
      if (++column < weight.columns || j + 1 >= count) continue;
      column = 0;
      if (++across == weight.across) {
        across = 0;
        if (++down == weight.rows) {
          down = 0;
          groups_above += weight.across;
        }
      }
      kept = keeps(groups_above + across);
    }
    if (count == kElements && are_aligned<kElements>(weight.mask)) {
      store(weight.mask + begin, pack);
      return;
    }
    CCTORCH_UNROLL
    for (int j = 0; j < kElements; ++j) {
      if (j < count) weight.mask[begin + j] = pack.values[j];
    }
  }
};

// Keeps the `count` best groups; `weights` end with the totals. launch(blocks, kernel) starts a kernel after the ones
// before.
template <typename S, typename Launch>
void keep_best(const Launch& launch, const std::vector<Weight>& weights, int64_t count, bool channels, int64_t blocks,
               const Workspace& workspace) {
  static_assert(sizeof(Score<S>) <= 4096);
  const auto size = static_cast<int64_t>(weights.size()) - 1;
  const int64_t groups = weights.back().first_group;
  int team = 1;
  for (; team < int(kWarp) && 2 * team * groups <= weights.back().first;) team *= 2;
  for (int64_t begin = 0; begin < size; begin += Score<S>::kWeights) {
    Score<S> score{
        {},      std::min(Score<S>::kWeights, size - begin), begin, workspace, groups, static_cast<Count>(count), team,
        channels};
    std::copy_n(weights.begin() + begin, score.size + 1, score.part);
    const int64_t of_part = score.part[score.size].first_group - score.part[0].first_group;
    launch(std::min(blocks, ceil_div(of_part * team, kThreads)), score);
  }
  const int64_t span = span_of(groups, blocks);
  if (count > 0) {
    const List<Entry> scores{workspace.entries, 1, groups, span};
    const select::Workspace selection{workspace.state, workspace.histogram, nullptr, workspace.entries, 0};
    // The exponent, and as much of the mantissa: few scores agree in both.
    const auto digits = select::digits<Count>();
    for (int i = 0; i < 2; ++i) {
      launch(ceil_div(groups, span), select::CountDigits<Count>{{scores, selection, {kInfinity}}, digits[i]});
    }
    launch(ceil_div(groups, span), Finish{workspace, groups, span, digits[1].shift});
  }
  const int64_t elements = weights.back().first;
  const int64_t part = span_of(elements, blocks);
  launch(ceil_div(elements, part), WriteMasks{{workspace.weights, size, elements, part}, workspace});
}

}  // namespace cctorch::cuda::group_masks
