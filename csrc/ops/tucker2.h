#pragma once

#include <ATen/core/Tensor.h>
#include <cctorch/low_rank.h>

#include <array>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

namespace cctorch {

// The arguments of tucker2 but for its lists of tensors.
struct Tucker2Size {
  at::IntArrayRef ranks_out, ranks_in;
  int64_t iterations;
};

void check_tucker2(at::TensorList weights, const Tucker2Size& size, at::TensorList bases_out, at::TensorList bases_in);

// core, basis_out, basis_in
using Tucker2Factors = std::array<at::Tensor, 3>;
Tucker2Factors empty_tucker2(const at::Tensor& weight, int64_t rank_out, int64_t rank_in);

// The factors of every weight, as three lists.
template <class Function>
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>> tucker2_lists(
    size_t count, const Function& factors_of) {
  std::vector<at::Tensor> cores, out, in;
  for (size_t i = 0; i < count; ++i) {
    Tucker2Factors factors = factors_of(i);
    cores.push_back(std::move(factors[0]));
    out.push_back(std::move(factors[1]));
    in.push_back(std::move(factors[2]));
  }
  return {cores, out, in};
}

// As starts_from_bases in truncated_svd.h.
bool tucker2_starts_from_bases(const at::Tensor& weight);

// One weight as outputs x inputs x kernel on its way, or a batch of them. Bases have orthonormal rows.
struct Tucker2Bases {
  at::Tensor out, in;
  // The weight with its outputs in the space of `out`, inputs x rank x kernel, where it has been calculated.
  at::Tensor narrowed;
};

// A basis of `rank` rows for an unfolding; `basis`, if defined, is one to make better.
using Tucker2Step = std::function<at::Tensor(const at::Tensor& unfolded, const at::Tensor& basis, int64_t rank)>;

// Higher-order orthogonal iteration: each basis in turn is made better for the other, of which `bases` has that of the
// inputs at least.
Tucker2Bases improved(const at::Tensor& w, const Tucker2Bases& bases, int64_t rank_out, int64_t iterations,
                      const Tucker2Step& step);
// The same from nothing: from the basis of the inputs of higher-order SVD, which without iterations is the result.
Tucker2Bases decomposed(const at::Tensor& w, int64_t rank_out, int64_t rank_in, int64_t iterations,
                        const Tucker2Step& step);
at::Tensor tucker2_core(const at::Tensor& w, const Tucker2Bases& bases);

}  // namespace cctorch
