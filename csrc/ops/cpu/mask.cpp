#include "csrc/ops/mask.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "csrc/ops/channelwise.h"
#include "csrc/ops/cpu/select.h"
#include "csrc/ops/formula/mask.h"

namespace cctorch::cpu {
namespace {

using formula::magnitude;
using select::Piece;

constexpr int64_t kBlock = 65536;

template <typename Bits>
const Bits* data(const at::Tensor& weight) {
  return static_cast<const Bits*>(weight.const_data_ptr());
}

// The weight with the strides of what is made of it.
at::Tensor dense_as(const at::Tensor& result, const at::Tensor& weight) {
  return weight.strides() == result.strides() ? weight : at::empty_like(weight).copy_(weight);
}

template <typename Bits>
bool has_nan(const at::Tensor& weight) {
  const Bits infinity = static_cast<Bits>(infinity_bits(weight.scalar_type()));
  const Bits* from = data<Bits>(weight);
  return at::parallel_reduce(
      0, weight.numel(), kBlock, false,
      [&](int64_t begin, int64_t end, bool found) {
        Bits largest = 0;
        for (int64_t i = begin; i < end; ++i) largest = std::max(largest, magnitude(from[i]));
        return found || largest > infinity;
      },
      [](bool a, bool b) { return a || b; });
}

[[noreturn]] void refuse_nan(const char* op, const std::string& name) {
  TORCH_CHECK(false, op, ": ", name, " has NaN, so its magnitudes cannot be ordered");
}

void check_no_nan(const at::Tensor& dense, const char* op, const std::string& name) {
  const bool found = with_bits(dense.scalar_type(), [&](auto bits) { return has_nan<decltype(bits)>(dense); });
  if (found) refuse_nan(op, name);
}

// Writes what becomes of each weight, kept or not: a boolean of its mask.
template <typename Bits>
struct Masks {
  using Result = bool;
  static int64_t run(const Piece<Bits>& piece, Bits least) {
    return select::loops<Bits>().mark(static_cast<bool*>(piece.to), piece.from, piece.size, least);
  }
  static at::Tensor result(const at::Tensor& weight) { return empty_mask(weight); }
};

// The same as a weight, or 0.
template <typename Bits>
struct Pruned {
  using Result = Bits;
  static int64_t run(const Piece<Bits>& piece, Bits least) {
    return select::loops<Bits>().prune(static_cast<Bits*>(piece.to), piece.from, piece.size, least);
  }
  static at::Tensor result(const at::Tensor& weight) { return at::empty_like(weight); }
};

// Keeps the magnitudes from `least` on; returns how many of each piece equal it.
template <typename Bits, typename Output>
std::vector<int64_t> keep(const std::vector<Piece<Bits>>& pieces, Bits least) {
  std::vector<int64_t> equal(pieces.size());
  select::parallel(pieces, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) equal[i] = Output::run(pieces[i], least);
  });
  return equal;
}

// Of the kept ones that equal the threshold, leaves the first `ties`.
template <typename Bits, typename Output>
void leave_first(const std::vector<Piece<Bits>>& pieces, const std::vector<int64_t>& equal, Bits threshold,
                 int64_t ties) {
  std::vector<Piece<Bits>> without;
  for (size_t i = 0; i < pieces.size(); ++i) {
    if (equal[i] > ties && ties == 0) without.push_back(pieces[i]);
    if (equal[i] > ties && ties > 0) {
      auto* to = static_cast<typename Output::Result*>(pieces[i].to);
      int64_t seen = 0;
      for (int64_t j = 0; j < pieces[i].size; ++j) {
        if (magnitude(pieces[i].from[j]) == threshold && seen++ >= ties) to[j] = 0;
      }
    }
    ties -= std::min(ties, equal[i]);
  }
  keep<Bits, Output>(without, static_cast<Bits>(threshold + 1));
}

// The list as one range of pieces, in the order of memory. Ties are decided in row-major order, which matters in one
// tensor at most: the others keep all or none of their equals.
template <typename Bits, typename Output>
struct Ranking {
  std::vector<at::Tensor> weights;
  std::vector<at::Tensor> results;
  std::vector<Piece<Bits>> pieces;
  std::vector<size_t> ends;  // of each tensor's pieces

  explicit Ranking(at::TensorList list) {
    for (const at::Tensor& weight : list) {
      results.push_back(Output::result(weight));
      weights.push_back(dense_as(results.back(), weight));
      append(pieces, weights.back(), results.back());
      ends.push_back(pieces.size());
    }
  }

  static void append(std::vector<Piece<Bits>>& pieces, const at::Tensor& weight, const at::Tensor& result) {
    select::append(pieces, data<Bits>(weight), result.mutable_data_ptr(), weight.numel(),
                   sizeof(typename Output::Result));
  }

  void keep_largest(Bits threshold, int64_t ties) {
    std::vector<int64_t> equal = keep<Bits, Output>(pieces, threshold);
    int64_t before = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      const auto begin = equal.begin() + static_cast<int64_t>(i == 0 ? 0 : ends[i - 1]);
      const auto end = equal.begin() + static_cast<int64_t>(ends[i]);
      const int64_t own = std::accumulate(begin, end, int64_t{0});
      if (before < ties && ties < before + own && !results[i].is_contiguous()) {
        keep_in_order(i, threshold, ties - before);
        // Settled, and not to be looked at again.
        std::fill(begin, end, 0);
        ties = before;
      }
      before += own;
    }
    leave_first<Bits, Output>(pieces, equal, threshold, ties);
  }

  void keep_in_order(size_t i, Bits threshold, int64_t ties) {
    const at::Tensor weight = weights[i].contiguous();
    const at::Tensor result = at::empty(weight.sizes(), results[i].options());
    std::vector<Piece<Bits>> rows;
    append(rows, weight, result);
    leave_first<Bits, Output>(rows, keep<Bits, Output>(rows, threshold), threshold, ties);
    results[i].copy_(result);
  }
};

template <template <typename> typename Output>
std::vector<at::Tensor> keep_largest(const char* op, at::TensorList weights, double sparsity) {
  check_magnitudes(op, weights, sparsity);
  if (weights.empty()) return {};
  return with_bits(weights[0].scalar_type(), [&](auto bits) {
    using Bits = decltype(bits);
    Ranking<Bits, Output<Bits>> ranking(weights);
    const int64_t total = select::total_size(ranking.pieces);
    if (total == 0) return ranking.results;
    const int64_t count = kept_count(sparsity, total);
    const auto selected = select::largest(ranking.pieces, std::max<int64_t>(1, count));
    if (selected.largest > static_cast<Bits>(infinity_bits(weights[0].scalar_type()))) {
      for (size_t i = 0; i < weights.size(); ++i) check_no_nan(ranking.weights[i], op, nth_weight(i));
    }
    // Without NaN, no magnitude has all bits.
    if (count == 0) ranking.keep_largest(magnitude(static_cast<Bits>(~Bits(0))), 0);
    if (count > 0) ranking.keep_largest(selected.threshold, selected.wanted);
    return ranking.results;
  });
}

std::vector<at::Tensor> magnitude_masks(at::TensorList weights, double sparsity) {
  return keep_largest<Masks>("magnitude_masks", weights, sparsity);
}

std::vector<at::Tensor> magnitude_prune(at::TensorList weights, double sparsity) {
  return keep_largest<Pruned>("magnitude_prune", weights, sparsity);
}

// The groups of one weight: m elements, `inner` apart in memory.
template <typename Bits>
struct Groups {
  const Bits* weight;
  bool* mask;
  int64_t count;
  int64_t inner;
  size_t of;  // the list's weight number
};

// Groups do not see the order of memory: any dense layout is taken as it is.
std::vector<at::Tensor> nm_masks(at::TensorList weights, int64_t n, int64_t m, int64_t axis) {
  check_nm_masks(weights, n, m, axis);
  std::vector<at::Tensor> masks;
  if (weights.empty()) return masks;
  with_bits(weights[0].scalar_type(), [&](auto bits) {
    using Bits = decltype(bits);
    std::vector<at::Tensor> kept_alive;
    std::vector<Groups<Bits>> parts;
    const int64_t most = std::max<int64_t>(1, kBlock / m);
    for (size_t i = 0; i < weights.size(); ++i) {
      masks.push_back(empty_mask(weights[i]));
      if (weights[i].numel() == 0) continue;
      const at::Tensor dense = dense_as(masks[i], weights[i]);
      kept_alive.push_back(dense);
      const auto layout = channelwise::layout(dense, axis < 0 ? axis + dense.dim() : axis);
      // A part begins at a multiple of `inner` groups, so that its offsets are those of a weight of its own.
      const int64_t step = ceil_div(most, layout.inner) * layout.inner;
      for (int64_t begin = 0; begin < dense.numel() / m; begin += step) {
        parts.push_back({data<Bits>(dense) + begin * m, masks[i].mutable_data_ptr<bool>() + begin * m,
                         std::min(step, dense.numel() / m - begin), layout.inner, i});
      }
    }
    const auto mark = select::loops<Bits>().groups;
    std::vector<Bits> largest(parts.size());
    at::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        largest[i] = mark(parts[i].mask, parts[i].weight, parts[i].count, n, m, parts[i].inner);
      }
    });
    for (size_t i = 0; i < parts.size(); ++i) {
      if (largest[i] > static_cast<Bits>(infinity_bits(weights[0].scalar_type()))) {
        refuse_nan("nm_masks", nth_weight(parts[i].of));
      }
    }
  });
  return masks;
}

at::Tensor apply_mask(const at::Tensor& weight, const at::Tensor& mask) {
  check_apply_mask(weight, mask);
  const at::Tensor y = at::empty_like(weight);
  const at::Tensor dense = dense_as(y, weight);
  const at::Tensor dense_mask = mask.strides() == y.strides() ? mask : empty_mask(y).copy_(mask);
  const bool* kept = dense_mask.const_data_ptr<bool>();
  with_bits(weight.scalar_type(), [&](auto bits) {
    using Bits = decltype(bits);
    const auto apply = select::loops<Bits>().apply;
    auto* to = static_cast<Bits*>(y.mutable_data_ptr());
    const Bits* from = data<Bits>(dense);
    at::parallel_for(0, y.numel(), kBlock / 2,
                     [&](int64_t begin, int64_t end) { apply(to + begin, from + begin, kept + begin, end - begin); });
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) {
  m.impl("magnitude_masks", &magnitude_masks);
  m.impl("magnitude_prune", &magnitude_prune);
  m.impl("nm_masks", &nm_masks);
  m.impl("apply_mask", &apply_mask);
}

}  // namespace cctorch::cpu
