#include "csrc/regularize/norms.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "csrc/ops/cpu/channelwise.h"
#include "csrc/ops/cpu/simd/norms.h"

namespace cctorch::regularize {

namespace {

simd::Norms norms(at::ScalarType type) {
  const auto storage = channelwise::storage(type);
  return for_isa(&simd::baseline::norms, &simd::avx2::norms, &simd::avx512::norms)(storage);
}

// Some elements, in the order of memory, and those that they are compared with, if any.
struct Piece {
  const char* from;
  const char* other;
  int64_t size;
  at::ScalarType type;
};

constexpr int64_t kPiece = 65536;

at::Tensor dense(const at::Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
}

at::Tensor like(const at::Tensor& tensor, const at::Tensor& other) {
  const bool same = tensor.strides() == other.strides() && tensor.scalar_type() == other.scalar_type();
  return same ? tensor : at::empty_like(other).copy_(tensor);
}

template <typename Square>
at::Tensor root_of_sum(const std::vector<Piece>& pieces, const Square& square) {
  std::vector<double> squares(pieces.size());
  at::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) squares[i] = square(pieces[i]);
  });
  return at::scalar_tensor(std::sqrt(std::accumulate(squares.begin(), squares.end(), 0.0)), at::kDouble);
}

at::Tensor total_norm_cpu(at::TensorList tensors) {
  std::vector<at::Tensor> kept_alive;
  std::vector<Piece> pieces;
  for (const at::Tensor& tensor : tensors) {
    const at::Tensor& values = kept_alive.emplace_back(dense(tensor));
    const auto* from = static_cast<const char*>(values.const_data_ptr());
    for (int64_t begin = 0; begin < values.numel(); begin += kPiece) {
      pieces.push_back({from + begin * values.element_size(), nullptr, std::min(kPiece, values.numel() - begin),
                        values.scalar_type()});
    }
  }
  return root_of_sum(pieces, [](const Piece& piece) { return norms(piece.type).square(piece.from, piece.size); });
}

at::Tensor total_distance_cpu(at::TensorList a, at::TensorList b) {
  std::vector<at::Tensor> kept_alive;
  std::vector<Piece> pieces;
  for (size_t i = 0; i < a.size(); ++i) {
    const at::Tensor values = dense(a[i]), others = like(b[i], values);
    kept_alive.insert(kept_alive.end(), {values, others});
    const auto* from = static_cast<const char*>(values.const_data_ptr());
    const auto* other = static_cast<const char*>(others.const_data_ptr());
    const int64_t bytes = others.element_size();
    for (int64_t begin = 0; begin < others.numel(); begin += kPiece) {
      pieces.push_back({from + begin * bytes, other + begin * bytes, std::min(kPiece, others.numel() - begin),
                        others.scalar_type()});
    }
  }
  return root_of_sum(pieces, [](const Piece& piece) {
    return norms(piece.type).squared_distance(piece.from, piece.other, piece.size);
  });
}

}  // namespace

at::Tensor total_norm(at::TensorList tensors) {
  if (tensors.empty()) return at::zeros({}, at::kDouble);
  if (tensors[0].is_cpu()) return total_norm_cpu(tensors);
  return at::linalg_vector_norm(at::stack(at::_foreach_norm(tensors, 2, at::kDouble)));
}

at::Tensor total_distance(at::TensorList a, at::TensorList b) {
  if (a.empty()) return at::zeros({}, at::kDouble);
  return a[0].is_cpu() ? total_distance_cpu(a, b) : total_norm(at::_foreach_sub(a, b));
}

}  // namespace cctorch::regularize
