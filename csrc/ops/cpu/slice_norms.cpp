#include "csrc/ops/cpu/slice_norms.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>

#include "csrc/largest_first.h"
#include "csrc/ops/cpu/channelwise.h"
#include "csrc/ops/cpu/simd/norms.h"

namespace cctorch::cpu {
namespace {

// outer x slices x inner elements in the order of memory.
struct Sliced {
  at::Tensor values, squares;
  int64_t outer, slices, inner;
};

Sliced sliced(const at::Tensor& tensor, int64_t axis) {
  const auto at = axis < 0 ? axis + tensor.dim() : axis;
  const auto product = [](at::IntArrayRef sizes) {
    return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
  };
  const auto sizes = tensor.sizes();
  return {tensor.contiguous(), at::empty({sizes[at]}, at::kDouble), product(sizes.slice(0, at)), sizes[at],
          product(sizes.slice(at + 1))};
}

// Some slices of one tensor. What is added together, and in which order, does not depend on the number of threads.
struct Piece {
  const Sliced* whole;
  int64_t begin, end;
};

void add(const Piece& piece) {
  const Sliced& whole = *piece.whole;
  const auto type = whole.values.scalar_type();
  const auto loops =
      for_isa(&simd::baseline::norms, &simd::avx2::norms, &simd::avx512::norms)(channelwise::storage(type));
  const auto slice = [&](int64_t o, int64_t s) {
    return static_cast<const char*>(whole.values.const_data_ptr()) +
           (o * whole.slices + s) * whole.inner * whole.values.element_size();
  };
  auto* squares = whole.squares.mutable_data_ptr<double>();
  if (whole.outer == 1) {
    for (int64_t s = piece.begin; s < piece.end; ++s) squares[s] = loops.square(slice(0, s), whole.inner);
    return;
  }
  std::vector<double> sums((piece.end - piece.begin) * whole.inner);
  for (int64_t o = 0; o < whole.outer; ++o) {
    loops.add_squares(slice(o, piece.begin), static_cast<int64_t>(sums.size()), sums.data());
  }
  for (int64_t s = piece.begin; s < piece.end; ++s) {
    const auto first = sums.begin() + (s - piece.begin) * whole.inner;
    squares[s] = std::accumulate(first, first + whole.inner, 0.0);
  }
}

}  // namespace

std::vector<at::Tensor> squared_slice_norms(at::TensorList tensors, int64_t axis) {
  constexpr int64_t elements = 1024;  // of a piece in a row: their sums stay in the first-level cache
  std::vector<Sliced> all;
  for (const at::Tensor& tensor : tensors) all.push_back(sliced(tensor, axis));
  std::vector<Piece> pieces;
  std::vector<double> costs;
  for (const Sliced& whole : all) {
    const int64_t step = std::max<int64_t>(1, elements / std::max<int64_t>(1, whole.inner));
    for (int64_t begin = 0; begin < whole.slices; begin += step) {
      pieces.push_back({&whole, begin, std::min(begin + step, whole.slices)});
      costs.push_back(static_cast<double>(whole.outer * whole.inner * (pieces.back().end - begin)));
    }
  }
  largest_first(costs, [&](size_t i) { add(pieces[i]); });
  std::vector<at::Tensor> squares;
  for (Sliced& whole : all) squares.push_back(std::move(whole.squares));
  return squares;
}

}  // namespace cctorch::cpu
