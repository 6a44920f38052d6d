#include "csrc/regularize/norms.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "csrc/ops/cpu/channelwise.h"
#include "csrc/ops/cpu/simd/norms.h"
#include "csrc/ops/cpu/slice_norms.h"

namespace cctorch::regularize {

namespace {

simd::Norms norms(at::ScalarType type) {
  const auto storage = channelwise::storage(type);
  return for_isa(&simd::baseline::norms, &simd::avx2::norms, &simd::avx512::norms)(storage);
}

constexpr int64_t kPiece = 65536;

at::Tensor like(const at::Tensor& tensor, const at::Tensor& other) {
  const bool same = tensor.strides() == other.strides() && tensor.scalar_type() == other.scalar_type();
  return same ? tensor : at::empty_like(other).copy_(tensor);
}

// Tensors in the order of memory, cut into pieces of one size. square(i, begin, size) is the sum over a piece of the
// i-th.
template <typename Square>
std::vector<std::vector<double>> squares_of_pieces(const std::vector<at::Tensor>& tensors, const Square& square) {
  std::vector<std::pair<size_t, int64_t>> pieces;
  std::vector<std::vector<double>> squares;
  for (size_t i = 0; i < tensors.size(); ++i) {
    squares.emplace_back((tensors[i].numel() + kPiece - 1) / kPiece);
    for (int64_t begin = 0; begin < tensors[i].numel(); begin += kPiece) pieces.emplace_back(i, begin);
  }
  at::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const auto [i, begin] = pieces[p];
      squares[i][begin / kPiece] = square(i, begin, std::min(kPiece, tensors[i].numel() - begin));
    }
  });
  return squares;
}

const char* at_element(const at::Tensor& tensor, int64_t index) {
  return static_cast<const char*>(tensor.const_data_ptr()) + index * tensor.element_size();
}

std::vector<at::Tensor> all_dense(at::TensorList tensors) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& tensor : tensors) result.push_back(dense(tensor));
  return result;
}

at::Tensor total_distance_cpu(at::TensorList a, at::TensorList b) {
  const auto from = all_dense(a);
  std::vector<at::Tensor> to;
  for (size_t i = 0; i < from.size(); ++i) to.push_back(like(b[i], from[i]));
  return total_norm(squares_of_pieces(from, [&](size_t i, int64_t begin, int64_t size) {
    return squared_distance(from[i].scalar_type(), at_element(from[i], begin), at_element(to[i], begin), size);
  }));
}

}  // namespace

at::Tensor dense(const at::Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
}

std::vector<std::vector<double>> part_squares(at::TensorList tensors, std::optional<int64_t> dimension) {
  if (dimension) {
    std::vector<std::vector<double>> squares;
    for (const at::Tensor& slices : cpu::squared_slice_norms(tensors, *dimension)) {
      squares.emplace_back(slices.const_data_ptr<double>(), slices.const_data_ptr<double>() + slices.numel());
    }
    return squares;
  }
  const auto values = all_dense(tensors);
  return squares_of_pieces(values, [&](size_t i, int64_t begin, int64_t size) {
    return norms(values[i].scalar_type()).square(at_element(values[i], begin), size);
  });
}

double squared_distance(at::ScalarType type, const void* a, const void* b, int64_t n) {
  return norms(type).squared_distance(a, b, n);
}

at::Tensor total_norm(const std::vector<std::vector<double>>& squares) {
  double sum = 0;
  for (const auto& parts : squares) sum = std::accumulate(parts.begin(), parts.end(), sum);
  return at::scalar_tensor(std::sqrt(sum), at::kDouble);
}

at::Tensor total_norm_on_device(at::TensorList tensors) {
  return at::linalg_vector_norm(at::stack(at::_foreach_norm(tensors, 2, at::kDouble)));
}

at::Tensor total_distance(at::TensorList a, at::TensorList b) {
  if (a.empty()) return at::zeros({}, at::kDouble);
  return a[0].is_cpu() ? total_distance_cpu(a, b) : total_norm_on_device(at::_foreach_sub(a, b));
}

}  // namespace cctorch::regularize
