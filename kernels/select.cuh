#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "csrc/ops/formula/layout.h"
#include "csrc/ops/formula/mask.h"
#include "kernels/list.cuh"
#include "kernels/vector.cuh"

// The largest magnitudes over a list of tensors, by radix selection. Every pass counts one digit of the magnitudes that
// agree with the digits found so far, from the top; what is found stays on the device.
namespace cctorch::cuda::select {

using Count = unsigned long long;  // a type that atomicAdd knows

constexpr int kDigitBits = 11;
constexpr unsigned kBins = 1u << kDigitBits;

// Of the kernels that read all weights, on a multiprocessor: all blocks run at once, so that none is left for the end.
constexpr unsigned kLeastBlocks = 4;

// A mask's element, or a weight's: its own value or 0.
template <typename Result, typename Bits>
__device__ Result kept_or_zero(Bits bits, bool kept) {
  if constexpr (std::is_same_v<Result, bool>) {
    return kept;
  } else {
    return kept ? bits : Bits(0);
  }
}

// After the last pass: the smallest magnitude that is kept, and how many of its equals are.
struct State {
  Count threshold;
  Count wanted;
  unsigned finished;  // blocks of the kernel that runs
  unsigned started;   // blocks of Keep
};

// Scratch memory on the device; nothing in it needs to be set.
struct Workspace {
  State* state;
  Count* histogram;  // kBins
  Count* ties;       // one for each block
  Entry* entries;    // one for each tensor, and the end
  int64_t blocks;

  static int64_t bytes(int64_t blocks, int64_t tensors) {
    return sizeof(State) + (kBins + blocks) * sizeof(Count) + (tensors + 1) * sizeof(Entry);
  }
  static Workspace at(void* memory, int64_t blocks) {
    auto* state = static_cast<State*>(memory);
    auto* histogram = reinterpret_cast<Count*>(state + 1);
    return {state, histogram, histogram + kBins, reinterpret_cast<Entry*>(histogram + kBins + blocks), blocks};
  }

  // Called by all threads of one block.
  __device__ void clear(const State& initial) const {
    for (unsigned bin = threadIdx.x; bin < kBins; bin += kThreads) histogram[bin] = 0;
    for (int64_t block = threadIdx.x; block < blocks; block += kThreads) ties[block] = 0;
    if (threadIdx.x == 0) *state = initial;
  }
};

// Writes part of the list to the device. It travels as an argument: nothing waits for a copy, and a captured graph
// keeps it.
struct Prepare {
  struct Shared {};
  static constexpr int64_t kEntries = 160;  // within the 4 KB that arguments may have

  Entry part[kEntries];
  int64_t begin;
  int64_t size;
  State initial;
  Workspace workspace;

  __device__ void operator()(Shared&) const {
    for (int64_t i = threadIdx.x; i < size; i += kThreads) workspace.entries[begin + i] = part[i];
    workspace.clear(initial);
  }
};

static_assert(sizeof(Prepare) <= 4096);

struct Digit {
  int shift;
  int width;
};

// What a pass over all weights works with.
template <typename Bits>
struct Pass {
  List<Entry> list;
  Workspace workspace;
  formula::MagnitudeOrNan<Bits> key;
};

// Calls found(bin, left) in one thread: with the bin where the counts, from the largest down, reach `wanted`, and how
// many of it that takes. Called by all threads of the block.
template <typename CountOf, typename Found>
__device__ void find_bin(const CountOf& count_of, Count wanted, Count* warp_sums, const Found& found) {
  constexpr unsigned kPerThread = kBins / kThreads;
  const unsigned top = kBins - 1 - threadIdx.x * kPerThread;
  Count own = 0;
  for (unsigned j = 0; j < kPerThread; ++j) own += count_of(top - j);
  const Count before = block_scan(own, warp_sums).before;
  if (wanted <= before || before + own < wanted) return;
  Count left = wanted - before;
  unsigned bin = top;
  for (; count_of(bin) < left; --bin) left -= count_of(bin);
  found(bin, left);
}

// Adds to the histogram the digits of the magnitudes that agree with the threshold above the digit. The block that ends
// last chooses the threshold's digit.
template <typename Bits>
struct CountDigits {
  static constexpr unsigned kLeastBlocks = select::kLeastBlocks;
  struct Shared {
    unsigned counts[kBins];
    Count warp_sums[kWarps];
    bool last;
  };

  Pass<Bits> pass;
  Digit digit;

  __device__ void operator()(Shared& shared) const {
    count(shared.counts);
    if (is_last_block(&pass.workspace.state->finished, &shared.last)) choose(shared.warp_sums);
  }

  __device__ void count(unsigned* counts) const {
    const Workspace& workspace = pass.workspace;
    for (unsigned bin = threadIdx.x; bin < kBins; bin += kThreads) counts[bin] = 0;
    __syncthreads();
    const int above = digit.shift + digit.width;
    const Bits agreed = static_cast<Bits>(workspace.state->threshold) >> above;
    const unsigned digit_mask = (1u << digit.width) - 1;
    pass.list.for_each_piece(blockIdx.x, [&](const Entry& entry, int64_t begin, int64_t end) {
      // Weights that were pruned are equal: a run of one digit is added at once.
      unsigned bin = 0;
      unsigned run = 0;
      visit_all(static_cast<const Bits*>(entry.weight), begin, end, [&](Bits bits) {
        const Bits magnitude = pass.key(bits);
        if (static_cast<Bits>(magnitude >> above) != agreed) return;
        const unsigned next = static_cast<unsigned>(magnitude >> digit.shift) & digit_mask;
        if (next != bin && run > 0) {
          atomicAdd(&counts[bin], run);
          run = 0;
        }
        bin = next;
        ++run;
      });
      if (run > 0) atomicAdd(&counts[bin], run);
    });
    __syncthreads();
    for (unsigned bin = threadIdx.x; bin < kBins; bin += kThreads) {
      if (counts[bin] > 0) atomicAdd(&workspace.histogram[bin], static_cast<Count>(counts[bin]));
    }
  }

  // Leaves the histogram at 0.
  __device__ void choose(Count* warp_sums) const {
    State* state = pass.workspace.state;
    Count* histogram = pass.workspace.histogram;
    find_bin([&](unsigned bin) { return read(&histogram[bin]); }, state->wanted, warp_sums,
             [&](unsigned bin, Count left) {
               state->threshold |= static_cast<Count>(bin) << digit.shift;
               state->wanted = left;
             });
    __syncthreads();
    for (unsigned bin = threadIdx.x; bin < kBins; bin += kThreads) histogram[bin] = 0;
    if (threadIdx.x == 0) state->finished = 0;
  }
};

// Keeps what is above the threshold, and the first `wanted` of what equals it. The result is bool for masks, Bits for
// weights.
template <typename Bits, typename Result>
struct Keep {
  static constexpr unsigned kLeastBlocks = select::kLeastBlocks;
  struct Shared {
    Count warp_sums[kWarps];
    unsigned block;
  };

  Pass<Bits> pass;

  __device__ void operator()(Shared& shared) const {
    // Parts are taken in the order in which blocks start: those that a block waits for run already.
    if (threadIdx.x == 0) shared.block = atomicAdd(&pass.workspace.state->started, 1u);
    __syncthreads();
    const unsigned block = shared.block;
    const Count ties = block_scan(keep_above(block), shared.warp_sums).total;
    if (threadIdx.x == 0) write(&pass.workspace.ties[block], ties + 1);
    // Few blocks have any, the others leave at once.
    if (ties > 0) keep_ties(block, shared.warp_sums);
  }

  // Returns how many equal the threshold.
  __device__ Count keep_above(unsigned block) const {
    const Bits threshold = static_cast<Bits>(pass.workspace.state->threshold);
    Count equal = 0;
    pass.list.for_each_piece(block, [&](const Entry& entry, int64_t begin, int64_t end) {
      map_all(static_cast<Result*>(entry.result), static_cast<const Bits*>(entry.weight), begin, end, [&](Bits bits) {
        const Bits magnitude = pass.key(bits);
        equal += magnitude == threshold;
        return kept_or_zero<Result>(bits, magnitude > threshold);
      });
    });
    return equal;
  }

  __device__ void keep_ties(unsigned block, Count* warp_sums) const {
    const Bits threshold = static_cast<Bits>(pass.workspace.state->threshold);
    const Count wanted = pass.workspace.state->wanted;
    Count part = 0;
    for (unsigned before = threadIdx.x; before < block; before += kThreads) part += ties_of(before);
    Count kept = block_scan(part, warp_sums).total;
    pass.list.for_each_piece(block, [&](const Entry& entry, int64_t begin, int64_t end) {
      const auto* weight = static_cast<const Bits*>(entry.weight);
      for (int64_t first = begin; first < end && kept < wanted; first += kThreads) {
        const int64_t i = first + threadIdx.x;
        const Bits bits = i < end ? weight[i] : Bits(0);
        const bool tie = i < end && pass.key(bits) == threshold;
        const Scan<Count> scan = block_scan(static_cast<Count>(tie), warp_sums);
        if (tie && kept + scan.before < wanted) {
          static_cast<Result*>(entry.result)[i] = kept_or_zero<Result>(bits, true);
        }
        kept += scan.total;
      }
    });
  }

  // Waits until the block has counted its ties.
  __device__ Count ties_of(unsigned block) const {
    const Count* ties = &pass.workspace.ties[block];
    for (; read(ties) == 0;) __nanosleep(100);
    return read(ties) - 1;
  }
};

// A magnitude has all bits but the sign.
template <typename Bits>
std::vector<Digit> digits() {
  std::vector<Digit> result;
  for (int top = 8 * sizeof(Bits) - 1; top > 0; top -= kDigitBits) {
    const int width = std::min(top, kDigitBits);
    result.push_back({top - width, width});
  }
  return result;
}

// Keeps the `count` largest of list.total > 0 elements. `entries` end as in List; launch(blocks, kernel) starts a
// kernel after the ones before.
template <typename Bits, typename Result, typename Launch>
void keep_largest(const Launch& launch, const std::vector<Entry>& entries, int64_t span, int64_t count, Bits infinity,
                  const Workspace& workspace) {
  const auto size = static_cast<int64_t>(entries.size());
  const List<Entry> list{workspace.entries, size - 1, entries.back().first, span};
  const int64_t blocks = ceil_div(list.total, span);
  const Pass<Bits> pass{list, workspace, {infinity}};
  // No magnitude reaches all bits: the threshold of no weight at all.
  const State initial{count > 0 ? 0 : ~Count(0), static_cast<Count>(count), 0, 0};
  for (int64_t begin = 0; begin < size; begin += Prepare::kEntries) {
    Prepare prepare{{}, begin, std::min(Prepare::kEntries, size - begin), initial, workspace};
    std::copy_n(entries.begin() + begin, prepare.size, prepare.part);
    launch(1, prepare);
  }
  for (const Digit& digit : count > 0 ? digits<Bits>() : std::vector<Digit>()) {
    launch(blocks, CountDigits<Bits>{pass, digit});
  }
  launch(blocks, Keep<Bits, Result>{pass});
}

}  // namespace cctorch::cuda::select
