#include "csrc/ops/fake_quant_weights.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <bit>

#include "csrc/ops/cpu/channelwise.h"
#include "csrc/ops/cpu/simd/largest.h"
#include "csrc/ops/mask.h"

namespace cctorch::cpu {
namespace {

// Rows of one weight that a thread takes at once; they stay in its cache between the two passes over each.
struct Task {
  size_t weight;
  int64_t begin;
  int64_t end;
};

constexpr int64_t kTaskElements = 65536;

std::vector<Task> tasks(const std::vector<SliceRows>& rows) {
  std::vector<Task> result;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].to.numel() == 0) continue;
    const int64_t step = std::max<int64_t>(1, kTaskElements / rows[i].size());
    for (int64_t begin = 0; begin < rows[i].count(); begin += step) {
      result.push_back({i, begin, std::min(begin + step, rows[i].count())});
    }
  }
  return result;
}

// While one part of a row is written the same part of the next row comes into the cache.
constexpr int64_t kPart = 1024;

template <typename S>
void prefetch(const S* from, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(from + i, /*rw=*/0, /*locality=*/2);
}

template <typename Bits>
simd::Largest<Bits> largest() {
  return for_isa(&simd::baseline::largest<Bits>, &simd::avx2::largest<Bits>, &simd::avx512::largest<Bits>)();
}

template <typename S>
void quantize(const std::vector<SliceRows>& rows, const std::vector<at::Tensor>& scales, int64_t bits) {
  using T = at::opmath_type<S>;
  using Bits = formula::BitsOf<S>;
  constexpr auto type = c10::CppTypeToScalarType<S>::value;
  const auto infinity = static_cast<Bits>(infinity_bits(type));
  const auto formula = formula::FakeQuantWeights<T>::with_qmax(symmetric_qmax(bits));
  const auto find_largest = largest<Bits>();
  const auto loops = channelwise::loops<formula::FakeQuant<T>>(type);
  const auto work = tasks(rows);
  int64_t elements = 0;
  for (const SliceRows& weight : rows) elements += weight.to.numel();
  const simd::Stores stores = simd::stores_for(elements * static_cast<int64_t>(sizeof(S)));
  at::parallel_for(0, static_cast<int64_t>(work.size()), 1, [&](int64_t first, int64_t last) {
    const simd::Fence fence(stores);
    for (int64_t i = first; i < last; ++i) {
      const Task& task = work[i];
      const SliceRows& weight = rows[task.weight];
      const int64_t size = weight.size();
      T* scale = scales[task.weight].mutable_data_ptr<T>();
      for (int64_t row = task.begin; row < task.end; ++row) {
        const S* from = weight.from.const_data_ptr<S>() + row * size;
        const Bits largest_bits = find_largest(reinterpret_cast<const Bits*>(from), size, infinity);
        scale[row] = formula.scale(static_cast<T>(std::bit_cast<S>(largest_bits)));
        S* to = weight.to.mutable_data_ptr<S>() + row * size;
        for (int64_t part = 0; part < size; part += kPart) {
          const int64_t length = std::min(kPart, size - part);
          if (row + 1 < task.end) prefetch(from + size + part, length);
          loops.forward(formula.grid, to + part, from + part, length, scale[row], stores);
        }
      }
    }
  });
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> fake_quant_weights(at::TensorList weights, int64_t bits,
                                                                                int64_t axis) {
  check_fake_quant_weights(weights, bits, axis);
  std::vector<SliceRows> rows;
  std::vector<at::Tensor> scales;
  for (const at::Tensor& weight : weights) {
    rows.emplace_back(weight, axis);
    scales.push_back(empty_scales(weight, axis));
    if (weight.numel() == 0) scales.back().fill_(1);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weights[0].scalar_type(), "fake_quant_weights",
                                  [&] { quantize<scalar_t>(rows, scales, bits); });
  std::vector<at::Tensor> quantized;
  for (size_t i = 0; i < rows.size(); ++i) quantized.push_back(rows[i].result(weights[i]));
  return {quantized, scales};
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) { m.impl("fake_quant_weights", &fake_quant_weights); }

}  // namespace cctorch::cpu
