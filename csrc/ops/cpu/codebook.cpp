#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "csrc/ops/cpu/channelwise.h"
#include "csrc/ops/cpu/learned_grid.h"
#include "csrc/ops/cpu/simd/codebook.h"
#include "csrc/ops/formula/codebook.h"
#include "csrc/ops/value_grid.h"

namespace cctorch::cpu {
namespace {

using channelwise::densified;
using learned_grid::with_math_type;

simd::CodebookLoops loops(at::ScalarType type) {
  return for_isa(&simd::baseline::codebook_loops, &simd::avx2::codebook_loops,
                 &simd::avx512::codebook_loops)(channelwise::storage(type));
}

// A codebook in ascending order. NaN comes first, and all is below its bounds: as for argmin it is the nearest.
template <typename T>
struct Ascending {
  std::vector<T> values, bounds;
  std::vector<int64_t> order;  // of each its place in the codebook

  explicit Ascending(const at::Tensor& codebook) : order(codebook.numel()) {
    const at::Tensor dense = codebook.contiguous();
    const T* from = dense.const_data_ptr<T>();
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return formula::comes_before(from[a], from[b]); });
    for (const int64_t place : order) values.push_back(from[place]);
    bounds.assign(std::bit_ceil(values.size()), std::numeric_limits<T>::infinity());
    if (std::isnan(values[0])) return;
    for (size_t i = 0; i + 1 < values.size(); ++i) bounds[i] = formula::bound_between(values[i], values[i + 1]);
  }
  simd::Codebook book() const { return {values.data(), bounds.data(), static_cast<int64_t>(values.size())}; }
};

// function(tensor, begin, size) of parts of all tensors, of so many elements each, on all threads.
template <typename Function>
void for_parts(const std::vector<at::Tensor>& tensors, const Function& function) {
  constexpr int64_t kPart = 16384;
  struct Part {
    size_t tensor;
    int64_t begin;
  };
  std::vector<Part> parts;
  for (size_t i = 0; i < tensors.size(); ++i) {
    for (int64_t begin = 0; begin < tensors[i].numel(); begin += kPart) parts.push_back({i, begin});
  }
  at::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const auto [tensor, begin] = parts[i];
      function(tensor, begin, std::min(kPart, tensors[tensor].numel() - begin));
    }
  });
}

const char* at_element(const at::Tensor& tensor, int64_t i) {
  return static_cast<const char*>(tensor.const_data_ptr()) + i * tensor.element_size();
}

std::vector<at::Tensor> quantized(at::TensorList xs, at::TensorList codebooks) {
  std::vector<at::Tensor> ys, dense;
  int64_t bytes = 0;
  for (const at::Tensor& x : xs) {
    dense.push_back(densified(x, ys.emplace_back(at::empty_like(x))));
    bytes += x.numel() * x.element_size();
  }
  const auto stores = simd::stores_for(bytes);
  with_math_type(xs[0], [&](auto zero) {
    std::vector<Ascending<decltype(zero)>> books;
    for (const at::Tensor& codebook : codebooks) books.emplace_back(codebook);
    const auto run = loops(xs[0].scalar_type()).quantize;
    for_parts(dense, [&](size_t i, int64_t begin, int64_t size) {
      const simd::Fence fence(stores);
      run(static_cast<char*>(ys[i].mutable_data_ptr()) + begin * ys[i].element_size(), at_element(dense[i], begin),
          size, books[i].book(), stores);
    });
  });
  return ys;
}

// Of each codebook's values the sum of their members' `values`, which have the layout of x, and how many there are.
// Parts are added up in order: how many threads there are makes no difference.
struct Members {
  std::vector<double> sums;
  std::vector<int64_t> counts;
};

template <typename T>
Members members_of(const at::Tensor& values, const at::Tensor& x, const Ascending<T>& ascending) {
  constexpr int64_t kSmallestPart = 16384, kMostParts = 64;
  const auto book = ascending.book();
  const auto add = loops(x.scalar_type()).add;
  const int64_t size = std::max(kSmallestPart, ceil_div(x.numel(), kMostParts)), count = ceil_div(x.numel(), size);
  const int64_t places = simd::kCopies * book.count;
  std::vector<Members> parts(count);
  at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      parts[i] = {std::vector<double>(places), std::vector<int64_t>(places)};
      const int64_t begin = i * size;
      add(at_element(values, begin), at_element(x, begin), std::min(size, x.numel() - begin), book,
          parts[i].sums.data(), parts[i].counts.data());
    }
  });
  Members members{std::vector<double>(book.count), std::vector<int64_t>(book.count)};
  for (const Members& part : parts) {
    for (int64_t place = 0; place < places; ++place) {
      members.sums[place % book.count] += part.sums[place];
      members.counts[place % book.count] += part.counts[place];
    }
  }
  return members;
}

at::Tensor codebook_quant(const at::Tensor& x, const at::Tensor& codebook) {
  check_codebook("codebook_quant", x, codebook);
  return quantized(x, codebook).front();
}

std::vector<at::Tensor> codebook_quant_list(at::TensorList x, at::TensorList codebook) {
  check_codebooks("codebook_quant", x, codebook);
  return quantized(x, codebook);
}

at::Tensor codebook_indices(const at::Tensor& x, const at::Tensor& codebook) {
  check_codebook("codebook_indices", x, codebook);
  const at::Tensor indices = at::empty(x.sizes(), x.options().dtype(at::kLong)), dense = x.contiguous();
  with_math_type(x, [&](auto zero) {
    const Ascending<decltype(zero)> ascending(codebook);
    const auto run = loops(x.scalar_type()).cells;
    for_parts({dense}, [&](size_t, int64_t begin, int64_t size) {
      std::vector<int32_t> cells(size);
      run(cells.data(), at_element(dense, begin), size, ascending.book());
      int64_t* to = indices.mutable_data_ptr<int64_t>() + begin;
      for (int64_t i = 0; i < size; ++i) to[i] = ascending.order[cells[i]];
    });
  });
  return indices;
}

at::Tensor codebook_update(const at::Tensor& x, const at::Tensor& codebook) {
  check_codebook("codebook_update", x, codebook);
  const at::Tensor updated = at::empty_like(codebook, at::MemoryFormat::Contiguous), dense = x.contiguous();
  with_math_type(x, [&](auto zero) {
    using T = decltype(zero);
    const Ascending<T> ascending(codebook);
    const Members members = members_of(dense, dense, ascending);
    T* to = updated.mutable_data_ptr<T>();
    for (size_t i = 0; i < ascending.order.size(); ++i) {
      to[ascending.order[i]] = members.counts[i] == 0
                                   ? ascending.values[i]
                                   : static_cast<T>(members.sums[i] / static_cast<double>(members.counts[i]));
    }
  });
  return updated;
}

at::Tensor member_sums(const at::Tensor& values, const at::Tensor& x, const at::Tensor& codebook) {
  const at::Tensor sums = at::empty_like(codebook, at::MemoryFormat::Contiguous), dense = x.contiguous();
  with_math_type(x, [&](auto zero) {
    using T = decltype(zero);
    const Ascending<T> ascending(codebook);
    const Members members = members_of(values.contiguous(), dense, ascending);
    T* to = sums.mutable_data_ptr<T>();
    for (size_t i = 0; i < ascending.order.size(); ++i) to[ascending.order[i]] = static_cast<T>(members.sums[i]);
  });
  return sums;
}

}  // namespace

TORCH_LIBRARY_IMPL(cctorch, CPU, m) {
  m.impl("codebook_quant", &codebook_quant);
  m.impl("codebook_quant.list", &codebook_quant_list);
  m.impl("codebook_indices", &codebook_indices);
  m.impl("codebook_update", &codebook_update);
  m.impl("_member_sums", &member_sums);
}

}  // namespace cctorch::cpu
