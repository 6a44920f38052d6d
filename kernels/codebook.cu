#include "kernels/codebook.cuh"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "csrc/ops/value_grid.h"
#include "kernels/launch.cuh"
#include "kernels/list.cuh"

namespace cctorch::cuda {
namespace {

constexpr int64_t kSpan = 16384;
constexpr int64_t kMostParts = 1024;  // whose sums are added up one after the other

bool fits(const at::Tensor& codebook) { return codebook.numel() <= codebook::kMostValues; }

bool fit(at::TensorList codebooks) { return std::all_of(codebooks.begin(), codebooks.end(), fits); }

// x as it lies in memory, or a copy, in the order of `like`.
at::Tensor laid_out(const at::Tensor& x, const at::Tensor& like) {
  return x.strides() == like.strides() && x.is_non_overlapping_and_dense() ? x : at::empty_like(like).copy_(x);
}

at::Tensor dense(const at::Tensor& x) { return x.is_non_overlapping_and_dense() ? x : x.contiguous(); }

template <typename S, typename T>
codebook::Part<S, T> part_of(const at::Tensor& x, const at::Tensor& codebook, int64_t span) {
  return {x.const_data_ptr<S>(), codebook.const_data_ptr<T>(), x.numel(), span, static_cast<int>(codebook.numel())};
}

std::vector<at::Tensor> quantized(at::TensorList xs, at::TensorList codebooks) {
  const c10::cuda::CUDAGuard guard(xs[0].device());
  std::vector<at::Tensor> ys, kept;  // what is read is kept until the launch
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, xs[0].scalar_type(), "codebook_quant", [&] {
    using T = at::opmath_type<scalar_t>;
    std::vector<codebook::Quantize<scalar_t, T>> bodies;
    for (size_t i = 0; i < xs.size(); ++i) {
      const at::Tensor& y = ys.emplace_back(at::empty_like(xs[i]));
      if (y.numel() == 0) continue;
      const at::Tensor x = kept.emplace_back(laid_out(xs[i], y)), book = kept.emplace_back(codebooks[i].contiguous());
      bodies.push_back({part_of<scalar_t, T>(x, book, kSpan), y.mutable_data_ptr<scalar_t>()});
    }
    launch_together(Launch(), bodies);
  });
  return ys;
}

// For each codebook the sums of its values' members, or their means.
std::vector<at::Tensor> totals(at::TensorList values, at::TensorList xs, at::TensorList codebooks, bool mean) {
  const c10::cuda::CUDAGuard guard(xs[0].device());
  std::vector<at::Tensor> results, kept;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, xs[0].scalar_type(), "codebook_update", [&] {
    using T = at::opmath_type<scalar_t>;
    std::vector<codebook::Sums<scalar_t, T>> sums;
    std::vector<codebook::Total<T>> last;
    int64_t places = 0;
    for (size_t i = 0; i < xs.size(); ++i) {
      const at::Tensor x = kept.emplace_back(dense(xs[i])), book = kept.emplace_back(codebooks[i].contiguous());
      const at::Tensor its = kept.emplace_back(laid_out(values[i].to(x.scalar_type()), x));
      const int64_t span = std::max(kSpan, ceil_div(ceil_div(x.numel(), kMostParts), kSpan) * kSpan);
      const auto part = part_of<scalar_t, T>(x, book, span);
      T* to = results.emplace_back(at::empty_like(book)).template mutable_data_ptr<T>();
      last.push_back({part.codebook, to, nullptr, nullptr, part.blocks(), part.count, mean});
      if (part.size > 0) sums.push_back({part, its.const_data_ptr<scalar_t>(), nullptr, nullptr});
      places += part.blocks() * part.count;
    }
    const at::Tensor of_sums = at::empty({places}, xs[0].options().dtype(at::kDouble));
    const at::Tensor of_counts = at::empty({places}, xs[0].options().dtype(at::kInt));
    auto* sum = of_sums.mutable_data_ptr<double>();
    auto* count = reinterpret_cast<unsigned*>(of_counts.mutable_data_ptr<int>());
    auto next = sums.begin();
    for (auto& total : last) {
      total.sums = sum;
      total.counts = count;
      if (total.parts > 0) {
        next->sums = sum;
        next++->counts = count;
      }
      sum += total.parts * total.count;
      count += total.parts * total.count;
    }
    launch_together(Launch(), sums);
    launch_together(Launch(), last);
  });
  return results;
}

at::Tensor codebook_quant(const at::Tensor& x, const at::Tensor& codebook) {
  check_codebook("codebook_quant", x, codebook);
  return fits(codebook) ? quantized(x, codebook).front() : composite::codebook_quant(x, codebook);
}

std::vector<at::Tensor> codebook_quant_list(at::TensorList x, at::TensorList codebook) {
  check_codebooks("codebook_quant", x, codebook);
  return fit(codebook) ? quantized(x, codebook) : composite::codebook_quant_list(x, codebook);
}

at::Tensor codebook_indices(const at::Tensor& x, const at::Tensor& codebook) {
  check_codebook("codebook_indices", x, codebook);
  if (!fits(codebook)) return composite::codebook_indices(x, codebook);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor from = x.contiguous(), book = codebook.contiguous();
  const at::Tensor indices = at::empty(x.sizes(), x.options().dtype(at::kLong));
  if (x.numel() == 0) return indices;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "codebook_indices", [&] {
    using T = at::opmath_type<scalar_t>;
    const std::vector<codebook::Indices<scalar_t, T>> bodies{
        {part_of<scalar_t, T>(from, book, kSpan), indices.mutable_data_ptr<int64_t>()}};
    launch_together(Launch(), bodies);
  });
  return indices;
}

at::Tensor codebook_update(const at::Tensor& x, const at::Tensor& codebook) {
  check_codebook("codebook_update", x, codebook);
  return fits(codebook) ? totals(x, x, codebook, true).front() : composite::codebook_update(x, codebook);
}

std::vector<at::Tensor> codebook_update_list(at::TensorList x, at::TensorList codebook) {
  check_codebooks("codebook_update", x, codebook);
  return fit(codebook) ? totals(x, x, codebook, true) : composite::codebook_update_list(x, codebook);
}

at::Tensor member_sums(const at::Tensor& values, const at::Tensor& x, const at::Tensor& codebook) {
  return fits(codebook) ? totals(values, x, codebook, false).front() : composite::member_sums(values, x, codebook);
}

std::vector<at::Tensor> member_sums_list(at::TensorList values, at::TensorList x, at::TensorList codebook) {
  return fit(codebook) ? totals(values, x, codebook, false) : composite::member_sums_list(values, x, codebook);
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CUDA, m) {
  m.impl("codebook_quant", &codebook_quant);
  m.impl("codebook_quant.list", &codebook_quant_list);
  m.impl("codebook_indices", &codebook_indices);
  m.impl("codebook_update", &codebook_update);
  m.impl("codebook_update.list", &codebook_update_list);
  m.impl("_member_sums", &member_sums);
  m.impl("_member_sums.list", &member_sums_list);
}

}  // namespace cctorch::cuda
